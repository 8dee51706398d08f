#include "pack.h"

#include "clones.h"

namespace codistill {
namespace {

CODISTILL_INLINE uint32_t word(BFloat16 first, BFloat16 second) {
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}

CODISTILL_INLINE uint32_t word(float value) {
  uint32_t out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

// in, [8, 8] words, transposed into out. Written for the compiler to make shuffles of.
CODISTILL_INLINE void transpose_words(const uint32_t (&in)[8][8], uint32_t* out, int64_t stride) {
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

constexpr int64_t kLineWords = 8;  // a cache line is written at once
constexpr int64_t kAhead = 32;      // rows: short parts of them, that the hardware does not foresee

template <typename V>
CODISTILL_INLINE void fetch(const V* in, int64_t size) {
  for (int64_t n = 0; n < size; n += 64 / static_cast<int64_t>(sizeof(V))) __builtin_prefetch(in + n);
}

// One word each of two rows of T (of one, for fp32), `width` of a slice; the others become zero.
template <typename T, typename Value>
CODISTILL_INLINE void pack_words(Value value, int64_t rows, int64_t width, uint32_t* out) {
  const int64_t slice = slice_width(), valid = rows > 0 ? width : 0;
  if constexpr (kPerWord<T> == 1)
    for (int64_t n = 0; n < valid; ++n) out[n] = word(value(0, n));
  else if (rows > 1)
    for (int64_t n = 0; n < valid; ++n) out[n] = word(value(0, n), value(1, n));
  else
    for (int64_t n = 0; n < valid; ++n) out[n] = word(value(0, n), T(0));
  std::fill(out + valid, out + slice, 0);
}

}  // namespace

template <typename T, typename W>
CODISTILL_CLONES void pack_transposed(const W* in, int64_t rows, int64_t columns, int64_t depth,
                                      uint32_t* out) {
  const int64_t slice = slice_width(), width = round_up(rows, slice);
  constexpr int64_t kStep = 8 * kPerWord<T>;
  for (int64_t n0 = 0; n0 < width; n0 += kLineWords) {
    uint32_t* to = out + packed_words<T>(depth, n0 / slice * slice) + n0 % slice;
    for (int64_t k0 = 0; k0 < depth; k0 += kStep, to += 8 * slice)
      for (int64_t n1 = 0; n1 < kLineWords; n1 += 8) {
        alignas(32) T block[8][kStep] = {};
        const int64_t valid = std::clamp<int64_t>(columns - k0, 0, kStep);
        for (int64_t n = 0; n < std::min<int64_t>(8, rows - n0 - n1); ++n) {
          const W* row = in + (n0 + n1 + n) * columns + k0;
          __builtin_prefetch(row + kLineWords * columns);
          if (valid == kStep && std::is_same_v<T, W>)
            std::memcpy(block[n], row, sizeof(block[n]));
          else if (valid == kStep)
            for (int64_t k = 0; k < kStep; ++k) block[n][k] = static_cast<T>(row[k]);
          else
            for (int64_t k = 0; k < valid; ++k) block[n][k] = static_cast<T>(row[k]);
        }
        uint32_t words[8][8];
        std::memcpy(words, block, sizeof(words));
        transpose_words(words, to + n1, slice);
      }
  }
}

template <typename T, typename W>
CODISTILL_CLONES void pack(const W* in, int64_t rows, int64_t stride, int64_t width, int64_t depth,
                           uint32_t* out) {
  const int64_t slice = slice_width();
  for (int64_t n0 = 0; n0 < width; n0 += slice)
    for (int64_t k = 0; k < depth; k += kPerWord<T>, out += slice) {
      const W* from = in + k * stride + n0;
      for (int64_t row = kAhead; row < kAhead + kPerWord<T>; ++row) fetch(from + row * stride, slice);
      const auto value = [&](int64_t row, int64_t n) __attribute__((always_inline)) {
        return static_cast<T>(from[row * stride + n]);
      };
      pack_words<T>(value, rows - k, std::min(slice, width - n0), out);
    }
}

template <typename T>
CODISTILL_CLONES void pack_scaled(const T* in, const int64_t* at, const float* factors, int64_t rows,
                                  int64_t stride, int64_t width, int64_t depth, uint32_t* out) {
  const int64_t slice = slice_width();
  for (int64_t k = 0; k < depth; k += kPerWord<T>, out += slice) {
    const int64_t first = std::min(k, rows - 1), second = std::min(k + 1, rows - 1);
    for (int64_t n0 = 0; n0 < width; n0 += slice) {
      const T* from[] = {in + at[first] * stride + n0, in + at[second] * stride + n0};
      const float by[] = {factors[first], factors[second]};
      const auto value = [&](int64_t row, int64_t n) __attribute__((always_inline)) {
        return static_cast<T>(by[row] * static_cast<float>(from[row][n]));
      };
      pack_words<T>(value, rows - k, std::min(slice, width - n0), out + packed_words<T>(depth, n0));
    }
  }
}

template <typename T, typename S>
CODISTILL_CLONES void transpose_tile(const S* in, int64_t rows, T* out) {
  constexpr int64_t kStep = 8 * kPerWord<T>, kStride = kDepth<T> / kPerWord<T>;
  uint32_t* words_out = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < rows; i += kStep) {
    for (int64_t row = i + kAhead; row < i + kAhead + kStep; ++row) fetch(in + row * kPanel, kRows);
    for (int64_t j = 0; j < kRows; j += 8) {
      alignas(32) uint32_t words[8][8];
      for (int64_t p = 0; p < 8; ++p) {
        const S* from = in + (i + p * kPerWord<T>) * kPanel + j;
        for (int64_t n = 0; n < 8; ++n)
          if constexpr (kPerWord<T> == 1)
            words[p][n] = word(static_cast<T>(from[n]));
          else
            words[p][n] = word(static_cast<T>(from[n]), static_cast<T>(from[kPanel + n]));
      }
      transpose_words(words, words_out + j * kStride + i / kPerWord<T>, kStride);
    }
  }
}

template <typename T, typename S>
CODISTILL_CLONES void convert(const S* in, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(in[i]);
}

template <typename T>
CODISTILL_CLONES void write_scaled(const float* in, float factor, int64_t size, bool add, T* out) {
  if (add)
    for (int64_t i = 0; i < size; ++i)
      out[i] = static_cast<T>(static_cast<float>(out[i]) + factor * in[i]);
  else
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(factor * in[i]);
}

#define CODISTILL_OPERANDS(T, W)                                                                  \
  template void pack_transposed<T, W>(const W*, int64_t, int64_t, int64_t, uint32_t*);            \
  template void pack<T, W>(const W*, int64_t, int64_t, int64_t, int64_t, uint32_t*);
CODISTILL_OPERANDS(BFloat16, BFloat16)
CODISTILL_OPERANDS(float, BFloat16)
CODISTILL_OPERANDS(float, Half)
CODISTILL_OPERANDS(float, double)
CODISTILL_OPERANDS(float, float)
#undef CODISTILL_OPERANDS

template void pack_scaled<BFloat16>(const BFloat16*, const int64_t*, const float*, int64_t,
                                        int64_t, int64_t, int64_t, uint32_t*);
template void pack_scaled<float>(const float*, const int64_t*, const float*, int64_t, int64_t,
                                 int64_t, int64_t, uint32_t*);
template void transpose_tile<BFloat16, BFloat16>(const BFloat16*, int64_t, BFloat16*);
template void transpose_tile<float, BFloat16>(const BFloat16*, int64_t, float*);
template void transpose_tile<float, float>(const float*, int64_t, float*);
template void convert<float, BFloat16>(const BFloat16*, int64_t, float*);
template void write_scaled<BFloat16>(const float*, float, int64_t, bool, BFloat16*);
template void write_scaled<Half>(const float*, float, int64_t, bool, Half*);
template void write_scaled<double>(const float*, float, int64_t, bool, double*);
template void write_scaled<float>(const float*, float, int64_t, bool, float*);

}  // namespace codistill
