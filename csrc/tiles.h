// Matrix products on tiles: operands packed as ATen's brgemm wants them, fp32 sums.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__linux__) && !defined(_OPENMP)
#error "compile with -fopenmp: at::parallel_for would run on one thread"
#endif

namespace codistill {

constexpr int64_t kRows = 64;    // rows of a left operand: always all of them, so always the same bits
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

// Whether products of bf16 run on bf16 instructions; else operands are converted to fp32.
inline bool multiplies_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && at::globalContext().userEnabledMkldnn();
#else
  return false;
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

template <typename T>
uint32_t word(T first, T second) {
  const T parts[] = {first, second};
  uint32_t out;
  std::memcpy(&out, parts, sizeof(out));
  return out;
}

// in, [8, 8] words, transposed into out. Written for the compiler to make shuffles of.
inline void transpose_words(const uint32_t (&in)[8][8], uint32_t* out, int64_t stride) {
  using Vec = uint32_t __attribute__((vector_size(32)));
  Vec a[8], b[8];
  std::memcpy(a, in, sizeof(a));
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shuffle(a[i], a[i + 1], Vec{0, 8, 2, 10, 4, 12, 6, 14});
    b[i + 1] = __builtin_shuffle(a[i], a[i + 1], Vec{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int i : {0, 1, 4, 5}) {
    a[i] = __builtin_shuffle(b[i], b[i + 2], Vec{0, 1, 8, 9, 4, 5, 12, 13});
    a[i + 2] = __builtin_shuffle(b[i], b[i + 2], Vec{2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shuffle(a[i], a[i + 4], Vec{0, 1, 2, 3, 8, 9, 10, 11});
    b[i + 4] = __builtin_shuffle(a[i], a[i + 4], Vec{4, 5, 6, 7, 12, 13, 14, 15});
  }
  for (int i = 0; i < 8; ++i) std::memcpy(out + i * stride, &b[i], sizeof(b[i]));
}

// out [depth, width] = packed(in^T) for in [rows, columns]; what `in` lacks is zero. width is whole
// slices; depth, a multiple of 8 words.
template <typename T, typename W>
void pack_transposed(const W* in, int64_t rows, int64_t columns, int64_t depth, int64_t width,
                     uint32_t* out) {
  const int64_t slice = slice_width();
  constexpr int64_t kStep = 8 * kPerWord<T>;
  for (int64_t n0 = 0; n0 < width; n0 += 8) {
    uint32_t* to = out + packed_words<T>(depth, n0 / slice * slice) + n0 % slice;
    for (int64_t k0 = 0; k0 < depth; k0 += kStep, to += 8 * slice) {
      alignas(32) T block[8][kStep] = {};
      const int64_t valid = std::clamp<int64_t>(columns - k0, 0, kStep);
      for (int64_t n = 0; n < std::min<int64_t>(8, rows - n0); ++n) {
        const W* row = in + (n0 + n) * columns + k0;
        if (valid == kStep)
          for (int64_t k = 0; k < kStep; ++k) block[n][k] = static_cast<T>(row[k]);
        else
          for (int64_t k = 0; k < valid; ++k) block[n][k] = static_cast<T>(row[k]);
      }
      uint32_t words[8][8];
      std::memcpy(words, block, sizeof(words));
      transpose_words(words, to, slice);
    }
  }
}

// out [depth, width] = packed(in) for in [rows, width]; rows that `in` lacks are zero.
template <typename T, typename W>
void pack(const W* in, int64_t rows, int64_t stride, int64_t width, int64_t depth, uint32_t* out) {
  const int64_t slice = slice_width(), words = depth / kPerWord<T>;
  for (int64_t n0 = 0; n0 < width; n0 += slice) {
    const int64_t valid = std::min(slice, width - n0);
    for (int64_t k = 0; k < words; ++k, out += slice) {
      const W* first = in + k * kPerWord<T> * stride + n0;
      const bool one = k * kPerWord<T> < rows, two = k * kPerWord<T> + 1 < rows;
      if (!one || valid < slice) std::fill(out, out + slice, 0);
      if constexpr (kPerWord<T> == 1) {
        for (int64_t n = 0; one && n < valid; ++n) {
          const float value = static_cast<float>(first[n]);
          std::memcpy(out + n, &value, sizeof(value));
        }
      } else if (two) {
        for (int64_t n = 0; n < valid; ++n) out[n] = word<T>(first[n], first[stride + n]);
      } else {
        for (int64_t n = 0; one && n < valid; ++n) out[n] = word<T>(first[n], T(0));
      }
    }
  }
}

// c [kRows, slice_width()] (+)= a [kRows, depth] @ one packed slice, kDepth terms at a time.
template <typename T>
void multiply(int64_t depth, const T* a, int64_t stride_a, const uint32_t* slice, float* c,
              int64_t stride_c, bool add) {
  for (int64_t k = 0; k < depth; k += kDepth<T>) {
    const int64_t part = std::min(kDepth<T>, depth - k), width = slice_width();
    at::native::cpublas::brgemm(kRows, width, part, stride_a, width, stride_c, add || k > 0, a + k,
                                reinterpret_cast<const T*>(slice + packed_words<T>(k, width)), c,
                                /*is_vnni=*/kPerWord<T> > 1);
  }
}

// For the end of a parallel region: gives back what brgemm holds of the core (AMX tiles).
template <typename T>
void release() {
  at::native::cpublas::brgemm_release(/*is_vnni=*/kPerWord<T> > 1);
}

}  // namespace codistill
