// How kernels/codistill_kernels/_native.py calls: C functions of views of tensors.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtypes.h"
#include "parallel.h"

#define CODISTILL_EXPORT extern "C" __attribute__((visibility("default")))

namespace codistill {

enum class DType : int64_t { kFloat, kDouble, kBFloat16, kHalf, kInt64 };

template <typename T>
constexpr DType kDTypeOf = std::is_same_v<T, float>      ? DType::kFloat
                           : std::is_same_v<T, double>   ? DType::kDouble
                           : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                           : std::is_same_v<T, Half>     ? DType::kHalf
                                                         : DType::kInt64;

inline int64_t item_size(DType dtype) {
  const bool is_short = dtype == DType::kBFloat16 || dtype == DType::kHalf;
  return is_short ? 2 : dtype == DType::kFloat ? 4 : 8;
}

// A tensor [rows] or [rows, columns], contiguous along its last dimension. Optional ones are pointers,
// and null where there is none.
struct View {
  void* data;
  DType dtype;
  int64_t rows, columns, stride;

  template <typename T>
  T* as() const {
    if (dtype != kDTypeOf<T>) throw std::invalid_argument("a tensor has an unexpected dtype");
    return static_cast<T*>(data);
  }
};

// Call body(data), with the float type that the tensor has. By reference: copying the body took longer
// than a short write.
template <typename Body>
void with_type(const View& tensor, const Body& body) {
  switch (tensor.dtype) {
    case DType::kBFloat16: return body(tensor.as<BFloat16>());
    case DType::kHalf: return body(tensor.as<Half>());
    case DType::kDouble: return body(tensor.as<double>());
    default: return body(tensor.as<float>());
  }
}

// Run body() on so many threads; null, or why it failed. No exception leaves the library.
template <typename Body>
const char* guarded(int64_t threads, const Body& body) noexcept {
  static thread_local std::string reason;
  try {
    set_num_threads(threads);
    body();
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return reason.c_str();
}

}  // namespace codistill
