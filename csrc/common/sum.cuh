// Long sums.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/numeric.cuh"

namespace dwswap {

template <typename A>
__device__ __forceinline__ A shuffled(A value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

// For elements of half precision, to which all errors of float32 sums are small, and for float64,
// which has no wider reference.
template <typename A>
struct PlainSum {
  A sum = 0;

  __device__ __forceinline__ void add(A x) { sum += x; }
  __device__ __forceinline__ void add(const PlainSum& other) { sum += other.sum; }
  __device__ __forceinline__ PlainSum from_lane(int offset) const {
    return {shuffled(sum, offset)};
  }
  __device__ __forceinline__ A value() const { return sum; }
};

// For float32: chains of additions are as long as an image is large. `error` collects what each
// addition rounds away (Knuth, The Art of Computer Programming, volume 2, 4.2.2, theorem B).
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

// A sum of elements of type T.
template <typename T>
using sum_t =
    std::conditional_t<std::is_same_v<T, float>, CompensatedSum, PlainSum<accumulator_t<T>>>;

// Sum over the threads of a group of `lanes` whose places differ by multiples of `from` (powers of
// 2), in all of them.
template <typename Sum>
__device__ __forceinline__ float sum_over_lanes(Sum sum, int lanes, int from = 1) {
  for (int offset = lanes / 2; offset >= from; offset /= 2) sum.add(sum.from_lane(offset));
  return sum.value();
}

}  // namespace dwswap
