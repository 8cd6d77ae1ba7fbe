// The activations as kernels compute them.
#pragma once

#include <cuda_runtime.h>

#include "common/activation.h"

namespace dwswap {

// min and max as aten has them: NaN stays NaN, which fminf and fmaxf would drop.
__device__ __forceinline__ float maximum(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}
__device__ __forceinline__ float minimum(float x, float y) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}
__device__ __forceinline__ double maximum(double x, double y) { return x < y ? y : x; }
__device__ __forceinline__ double minimum(double x, double y) { return x > y ? y : x; }

template <typename A>
__device__ __forceinline__ A clamp(A x, A low, A high) {
  return minimum(maximum(x, low), high);
}

// None, relu and relu6 are min(max(x, low), high).
__device__ __forceinline__ float low_of(Activation activation) {
  return activation == Activation::kNone ? -INFINITY : 0.0f;
}
__device__ __forceinline__ float high_of(Activation activation) {
  return activation == Activation::kRelu6 ? 6.0f : INFINITY;
}

// The fast forms are relative to the scale of the result as good as float32: where the error of
// __expf grows, the result is small.
__device__ __forceinline__ float sigmoid_of(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ __forceinline__ float silu_of(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ __forceinline__ double sigmoid_of(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ double silu_of(double x) { return x / (1.0 + exp(-x)); }
__device__ __forceinline__ float gelu_of(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}
__device__ __forceinline__ double gelu_of(double x) {
  return 0.5 * x * (1.0 + erf(x * 0.70710678118654752));
}

// The clamp of (x + 3) / 6 to [0, 1] goes with the multiply-add; NaN comes back with the factor x.
__device__ __forceinline__ float hardswish_of(float x) {
  return x * __saturatef(fmaf(x, 1.0f / 6.0f, 0.5f));
}
__device__ __forceinline__ double hardswish_of(double x) {
  return x * clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <typename A>
__device__ __forceinline__ A gelu_tanh_of(A x) {
  return x * sigmoid_of(A(1.5957691216057308) * (x + A(0.044715) * x * x * x));
}

// Applies one activation to N values. The switch is on a kernel argument, so it is uniform, and
// it is taken once for all N.
template <int N, typename A>
__device__ __forceinline__ void activate(A (&x)[N], Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = maximum(x[i], A(0));
      return;
    case Activation::kRelu6:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = clamp(x[i], A(0), A(6));
      return;
    case Activation::kHardswish:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = hardswish_of(x[i]);
      return;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = silu_of(x[i]);
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = gelu_of(x[i]);
      return;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = gelu_tanh_of(x[i]);
      return;
    case Activation::kHardsigmoid:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = clamp(x[i] + A(3), A(0), A(6)) * A(1.0 / 6.0);
      return;
    case Activation::kSigmoid:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = sigmoid_of(x[i]);
      return;
  }
}

// The same by calls for four values each. Where a thread has dozens, the code of all activations
// for every one of them would be most of the kernel, and of the time to compile it.
inline __device__ __noinline__ float4 activated(float4 values, Activation activation) {
  float x[4] = {values.x, values.y, values.z, values.w};
  activate(x, activation);
  return {x[0], x[1], x[2], x[3]};
}
template <int N>
__device__ __forceinline__ void activate_by_calls(float (&x)[N], Activation activation) {
  if (activation == Activation::kNone) return;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const auto at = [&](int offset) { return x[i + offset < N ? i + offset : i]; };
    const float4 y = activated({at(0), at(1), at(2), at(3)}, activation);
    const float all[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int j = 0; j < 4 && i + j < N; ++j) x[i + j] = all[j];
  }
}

}  // namespace dwswap
