// Matrix products on tiles: operands packed as ATen's brgemm wants them, fp32 sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "clones.h"
#include "dtypes.h"
#include "products.h"

namespace codistill {

constexpr int64_t kRows = 64;    // rows of a left operand; the last ones of a matrix may be fewer
constexpr int64_t kUnit = 16;    // rows that matrices in memory are padded to
constexpr int64_t kPanel = 256;  // vocabulary rows that are worked on at once

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns of one brgemm. With AVX2's 16 registers 64 x 32 runs 1.4 times as fast as 64 x 64; AVX-512
// has 32 of twice the width.
inline int64_t slice_width() {
#if defined(__x86_64__)
  static const int64_t width = __builtin_cpu_supports("avx512f") ? 64 : 32;
  return width;
#else
  return 32;
#endif
}

// A packed right operand [depth, width] is slices [depth, slice_width()] of T; of bf16, two rows are
// interleaved (VNNI), so its unit is 32 bits for both types.
template <typename T>
constexpr int64_t kPerWord = sizeof(uint32_t) / sizeof(T);

// Terms of a sum of products: a product adds them up one after the other, and the error of a sum
// grows with its length.
template <typename T>
constexpr int64_t kDepth = 128 * kPerWord<T>;

template <typename T>
int64_t packed_words(int64_t depth, int64_t width) {
  return depth / kPerWord<T> * round_up(width, slice_width());
}

// Height of the tile from `first` on in a matrix of so many rows: kRows, or what is left, in eights: few
// sizes. An element is summed over `depth` in one order whatever the other rows are.
inline int64_t tile_height(int64_t first, int64_t rows) {
  return std::min(kRows, round_up(rows - first, 8));
}

// Ask for a tile before it is needed: a product goes through its left operand in steps too short for
// the hardware to foresee them. kWrite: it will be written. Always inline: GCC takes a function that
// only prefetches for one without effect, and drops its calls.
template <bool kWrite = false, typename T>
CODISTILL_INLINE void prefetch(const T* tile, int64_t height, int64_t stride, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < height; ++i)
    for (int64_t k = 0; k < width; k += kLine) __builtin_prefetch(tile + i * stride + k, kWrite, 2);
}

// c [height, slice_width()] (+)= a [height, depth] @ one packed slice, kDepth terms at a time.
template <typename T>
void multiply(int64_t height, int64_t depth, const T* a, int64_t stride_a, const uint32_t* slice, float* c,
              int64_t stride_c, bool add) {
  for (int64_t k = 0; k < depth; k += kDepth<T>) {
    const int64_t part = std::min(kDepth<T>, depth - k), width = slice_width();
    products.of<T>()(height, width, part, stride_a, width, stride_c, add || k > 0, a + k,
                     reinterpret_cast<const T*>(slice + packed_words<T>(k, width)), c,
                     /*is_vnni=*/kPerWord<T> > 1);
  }
}

// For the end of a parallel region: gives back what brgemm holds of the core (AMX tiles).
template <typename T>
void release() {
  if (products.release != nullptr) products.release(/*is_vnni=*/kPerWord<T> > 1);
}

}  // namespace codistill
