// Who multiplies tiles: ATen's brgemm, or a loop of our own where this torch has none.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace codistill {

// c [m, n] (+)= a [m, k] @ b [k, n], fp32 sums; of bf16, `b` has two rows interleaved (VNNI).
// Parameters are those of at::native::cpublas::brgemm.
template <typename T>
using Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t stride_a, int64_t stride_b,
                         int64_t stride_c, bool add, const T* a, const T* b, float* c, bool is_vnni);

// m: a multiple of 4; n: slice_width(), of tiles.h.
void multiply_tiles(int64_t m, int64_t n, int64_t k, int64_t stride_a, int64_t stride_b,
                    int64_t stride_c, bool add, const float* a, const float* b, float* c, bool is_vnni);

struct Products {
  Product<float> of_float = multiply_tiles;
  Product<BFloat16> of_bf16 = nullptr;  // operands are then converted to fp32
  void (*release)(bool is_vnni) = nullptr;

  template <typename T>
  Product<T> of() const {
    if constexpr (std::is_same_v<T, float>)
      return of_float;
    else
      return of_bf16;
  }
};

inline Products products;  // written when the library is loaded

}  // namespace codistill
