// Operands and results of the products in tiles.h, as they lie in memory.
//
// A packed right operand [depth, width] is slices [depth, slice_width()] of T; of bf16, two rows are
// interleaved (VNNI), so its unit is 32 bits for both types.
#pragma once

#include "tiles.h"

namespace codistill {

// out [depth, rows] = packed(in^T) for in [rows, columns], with zeros up to the next whole slice of
// rows and up to depth, a multiple of 8 words.
template <typename T, typename W>
void pack_transposed(const W* in, int64_t rows, int64_t columns, int64_t depth, uint32_t* out);

// out [depth, width] = packed(in) for in [rows, width]; rows that `in` lacks are zero.
template <typename T, typename W>
void pack(const W* in, int64_t rows, int64_t stride, int64_t width, int64_t depth, uint32_t* out);

// The same of rows at[i] of `in`, each times factors[i] and rounded once.
template <typename T>
void pack_scaled(const T* in, const int64_t* at, const float* factors, int64_t rows, int64_t stride,
                 int64_t width, int64_t depth, uint32_t* out);

// out [kRows, kDepth<T>] = in^T for kRows columns of in [rows, kPanel]; rows: a multiple of 16, of
// which as many columns are written.
template <typename T, typename S>
void transpose_tile(const S* in, int64_t rows, T* out);

// out [size] = in.
template <typename T, typename S>
void convert(const S* in, int64_t size, T* out);

// out [size] (+)= factor * in, rounded once.
template <typename T>
void write_scaled(const float* in, float factor, int64_t size, bool add, T* out);

}  // namespace codistill
