// Sums of the squeeze_excitation kernels, and the activations of what is as good as exact.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/activation.cuh"

namespace dwswap {

__device__ __forceinline__ float shuffled(float value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

// For elements of half precision, to which all errors of float32 sums are small.
struct PlainSum {
  float sum = 0.0f;

  __device__ __forceinline__ void add(float x) { sum += x; }
  __device__ __forceinline__ void add(const PlainSum& other) { sum += other.sum; }
  __device__ __forceinline__ PlainSum from_lane(int offset) const {
    return {shuffled(sum, offset)};
  }
  __device__ __forceinline__ float value() const { return sum; }
};

// For float32: chains of additions are as long as an image is large, and the layers multiply the
// error of a mean. `error` collects what each addition rounds away (Knuth, The Art of Computer
// Programming, volume 2, 4.2.2, theorem B).
struct CompensatedSum {
  float sum = 0.0f, error = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float total = sum + x, added = total - sum;
    error += (sum - (total - added)) + (x - added);
    sum = total;
  }
  __device__ __forceinline__ void add(const CompensatedSum& other) {
    add(other.sum);
    error += other.error;
  }
  __device__ __forceinline__ CompensatedSum from_lane(int offset) const {
    return {shuffled(sum, offset), shuffled(error, offset)};
  }
  // Once the sum is infinite, the error is NaN.
  __device__ __forceinline__ float value() const { return isfinite(sum) ? sum + error : sum; }
};

template <typename T>
using sum_t = std::conditional_t<sizeof(T) == 4, CompensatedSum, PlainSum>;

// Sum over the threads of a group of `lanes` whose places differ by multiples of `from` (powers of
// 2), in all of them.
template <typename Sum>
__device__ __forceinline__ float sum_over_lanes(Sum sum, int lanes, int from = 1) {
  for (int offset = lanes / 2; offset >= from; offset /= 2) sum.add(sum.from_lane(offset));
  return sum.value();
}

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
