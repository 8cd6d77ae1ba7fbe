// The activations of what is as good as exact.
#pragma once

#include <cuda_runtime.h>

#include "common/activation.cuh"

namespace dwswap {

// The hidden units and the gates are few, and an error of a gate is one of a whole plane: the exact
// forms where `activate` has fast ones.
__device__ __forceinline__ float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::kSigmoid:
      return 1.0f / (1.0f + expf(-x));
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kGeluTanh:
      return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    case Activation::kHardsigmoid:
      return clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f;
    case Activation::kHardswish:
      return x * clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f;
    default: {
      float values[1] = {x};
      activate(values, activation);
      return values[0];
    }
  }
}

}  // namespace dwswap
