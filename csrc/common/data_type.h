// Element types and layouts as the kernels know them, and from run-time to compile-time types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dwswap {

enum class DataType { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int kVectorBytes = 16;  // of the widest access of a thread

// Sizes and strides count elements. Dense: N, C, H, W in that order of strides (kContiguous) or
// N, H, W, C (kChannelsLast), without gaps.
enum class Layout { kContiguous, kChannelsLast, kStrided };

struct Strides {
  int64_t n, c, h, w;
};

constexpr bool is_half(DataType type) {
  return type == DataType::kFloat16 || type == DataType::kBFloat16;
}

constexpr int bytes_of(DataType type) {
  return is_half(type) ? 2 : type == DataType::kFloat32 ? 4 : 8;
}

// visit.operator()<T>() for a type that is_half().
template <typename Visit>
cudaError_t visit_half_type(DataType type, Visit&& visit) {
  return type == DataType::kFloat16 ? visit.template operator()<__half>()
                                    : visit.template operator()<__nv_bfloat16>();
}

// The same for the element types of the fast kernels, which float64 is not.
template <typename Visit>
cudaError_t visit_fast_type(DataType type, Visit&& visit) {
  switch (type) {
    case DataType::kFloat32:
      return visit.template operator()<float>();
    case DataType::kFloat16:
      return visit.template operator()<__half>();
    case DataType::kBFloat16:
      return visit.template operator()<__nv_bfloat16>();
    case DataType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

// The same for all of them.
template <typename Visit>
cudaError_t visit_type(DataType type, Visit&& visit) {
  if (type == DataType::kFloat64) return visit.template operator()<double>();
  return visit_fast_type(type, visit);
}

}  // namespace dwswap
