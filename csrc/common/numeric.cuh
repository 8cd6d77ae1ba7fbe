// Element types, their accumulators, vector access, and division by a run-time constant.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dwswap {

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T narrow(accumulator_t<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N consecutive elements that are loaded or stored by one instruction (2 to 16 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
  T data[N];
};

template <int N, typename T>
__device__ __forceinline__ void load(const T* source, accumulator_t<T> (&target)[N]) {
  const auto vector = *reinterpret_cast<const Vector<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = widen(vector.data[i]);
}

// Two values by one conversion instruction where there is one.
template <typename T>
__device__ __forceinline__ Vector<T, 2> narrow_pair(accumulator_t<T> a, accumulator_t<T> b) {
  return {narrow<T>(a), narrow<T>(b)};
}
template <>
__device__ __forceinline__ Vector<__half, 2> narrow_pair<__half>(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return {__low2half(pair), __high2half(pair)};
}
template <>
__device__ __forceinline__ Vector<__nv_bfloat16, 2> narrow_pair<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return {__low2bfloat16(pair), __high2bfloat16(pair)};
}

template <int N, typename T>
__device__ __forceinline__ void store(T* target, const accumulator_t<T> (&source)[N]) {
  Vector<T, N> vector;
  if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const auto pair = narrow_pair<T>(source[i], source[i + 1]);
      vector.data[i] = pair.data[0], vector.data[i + 1] = pair.data[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) vector.data[i] = narrow<T>(source[i]);
  }
  *reinterpret_cast<Vector<T, N>*>(target) = vector;
}

// Division of n < 2^31 by a divisor that is fixed per launch: a multiplication and a shift
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  // n -> n / value; *remainder = n % value.
  __device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t* remainder) const {
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
    *remainder = n - quotient * value;
    return quotient;
  }
};

}  // namespace dwswap
