// From run-time to compile-time element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "depthwise_conv2d/params.h"

namespace dwswap {

// visit.operator()<T>() for the element types of the fast families; float64 has the general one.
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

}  // namespace dwswap
