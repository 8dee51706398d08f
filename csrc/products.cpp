#include "products.h"

#include <cstring>
#include <vector>

#include "clones.h"
#include "interface.h"
#include "tiles.h"

namespace codistill {
namespace {

constexpr int64_t kLanes = 8, kRowsAtOnce = 4;
using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));

// c (+)= a @ b, each with its stride.
struct Matrices {
  const float* a;
  const float* b;
  float* c;
  int64_t stride_a, stride_b, stride_c;
  bool add;
};

// kRowsAtOnce rows of c from `first` on, kVectors vectors wide from column `n` on: their sums, 8 or 16,
// stay in registers and hide the latency of a multiply-add.
template <int64_t kVectors>
CODISTILL_INLINE void multiply_rows(const Matrices& all, int64_t first, int64_t n, int64_t k) {
  const int64_t stride_a = all.stride_a, stride_b = all.stride_b, stride_c = all.stride_c;
  const float *a = all.a + first * stride_a, *b = all.b + n;
  float* c = all.c + first * stride_c + n;
  Vec sums[kRowsAtOnce][kVectors] = {};
  if (all.add)
    for (int64_t i = 0; i < kRowsAtOnce; ++i)
      for (int64_t j = 0; j < kVectors; ++j)
        std::memcpy(&sums[i][j], c + i * stride_c + j * kLanes, sizeof(Vec));
  for (int64_t term = 0; term < k; ++term, b += stride_b) {
    Vec row[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) std::memcpy(&row[j], b + j * kLanes, sizeof(Vec));
    for (int64_t i = 0; i < kRowsAtOnce; ++i)
      for (int64_t j = 0; j < kVectors; ++j) sums[i][j] += a[i * stride_a + term] * row[j];
  }
  for (int64_t i = 0; i < kRowsAtOnce; ++i)
    for (int64_t j = 0; j < kVectors; ++j)
      std::memcpy(c + i * stride_c + j * kLanes, &sums[i][j], sizeof(Vec));
}

template <int64_t kVectors>
CODISTILL_INLINE void multiply_columns(const Matrices& all, int64_t m, int64_t n, int64_t k) {
  for (int64_t j = 0; j < n; j += kVectors * kLanes)
    for (int64_t i = 0; i < m; i += kRowsAtOnce) multiply_rows<kVectors>(all, i, j, k);
}

// Whether a product multiplies as it should: small whole numbers, whose sums are exact in any order,
// with every size and stride different. Of bf16, b [k, n] has rows of n pairs.
template <typename T>
bool multiplies(Product<T> product) {
  constexpr int64_t kM = 8, kK = 16, kStrideA = 24;
  constexpr bool kIsVnni = sizeof(T) == 2;
  const int64_t n = slice_width(), stride_c = n + 16;
  std::vector<T> a(kM * kStrideA), b(kK * n);
  std::vector<float> c(kM * stride_c, 1.0f);
  const auto left = [](int64_t i, int64_t k) { return static_cast<float>((i * 5 + k * 3) % 7 - 3); };
  const auto right = [](int64_t k, int64_t j) { return static_cast<float>((k * 11 + j) % 5 - 2); };
  for (int64_t k = 0; k < kK; ++k) {
    for (int64_t i = 0; i < kM; ++i) a[i * kStrideA + k] = left(i, k);
    for (int64_t j = 0; j < n; ++j)
      b[kIsVnni ? (k / 2 * n + j) * 2 + k % 2 : k * n + j] = right(k, j);
  }
  try {
    product(kM, n, kK, kStrideA, n, stride_c, /*add=*/true, a.data(), b.data(), c.data(), kIsVnni);
  } catch (const std::exception&) {
    return false;  // ATen refuses where oneDNN is switched off
  }
  for (int64_t i = 0; i < kM; ++i)
    for (int64_t j = 0; j < stride_c; ++j) {
      float expected = 1.0f;
      for (int64_t k = 0; j < n && k < kK; ++k) expected += left(i, k) * right(k, j);
      if (c[i * stride_c + j] != expected) return false;
    }
  return true;
}

bool has_bf16_instructions() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

CODISTILL_CLONES
void multiply_tiles(int64_t m, int64_t n, int64_t k, int64_t stride_a, int64_t stride_b,
                    int64_t stride_c, bool add, const float* a, const float* b, float* c, bool) {
  const Matrices all{a, b, c, stride_a, stride_b, stride_c, add};
  if (n == 64)  // AVX-512 has 32 registers
    multiply_columns<4>(all, m, n, k);
  else
    multiply_columns<2>(all, m, n, k);
}

}  // namespace codistill

// Torch's functions, null where it has none, are used from here on, if they multiply as expected.
CODISTILL_EXPORT void codistill_use_products(codistill::Product<float> of_float,
                                             codistill::Product<codistill::BFloat16> of_bf16,
                                             void (*release)(bool)) {
  using namespace codistill;
  products = Products{};
  if (of_float != nullptr && multiplies(of_float)) products.of_float = of_float;
  if (release == nullptr) return;
  products.release = release;
  if (of_bf16 != nullptr && has_bf16_instructions() && multiplies(of_bf16)) products.of_bf16 = of_bf16;
  release(/*is_vnni=*/true);
}

// Whether products of bf16 run on bf16 instructions; else operands are converted to fp32.
CODISTILL_EXPORT bool codistill_multiplies_bf16() { return codistill::products.of_bf16 != nullptr; }
