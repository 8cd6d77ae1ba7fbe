// The gates as the kernels have them: in float32, of any of the types.
#pragma once

#include "channel_scale/params.h"
#include "common/activation.cuh"
#include "common/numeric.cuh"

namespace dwswap {
namespace channel_scale {

// z of N channels. They are of type T, or T is float and they are narrower.
template <typename T, int N>
__device__ __forceinline__ void load_gates(const ChannelScaleParams& p, int64_t at, float (&z)[N]) {
  if constexpr (sizeof(T) == 4) {
    switch (p.gate_type) {
      case DataType::kFloat16:
        return load(static_cast<const __half*>(p.gates) + at, z);
      case DataType::kBFloat16:
        return load(static_cast<const __nv_bfloat16*>(p.gates) + at, z);
      default:
        break;
    }
  }
  load(static_cast<const T*>(p.gates) + at, z);
}

template <typename T>
__device__ __forceinline__ void store_gradient(const ChannelScaleParams& p, int64_t at,
                                               float gradient) {
  if constexpr (sizeof(T) == 4) {
    switch (p.gate_type) {
      case DataType::kFloat16:
        static_cast<__half*>(p.gate_gradients)[at] = narrow<__half>(gradient);
        return;
      case DataType::kBFloat16:
        static_cast<__nv_bfloat16*>(p.gate_gradients)[at] = narrow<__nv_bfloat16>(gradient);
        return;
      default:
        break;
    }
  }
  static_cast<T*>(p.gate_gradients)[at] = narrow<T>(gradient);
}

// An error of a gate is one of a whole plane, which float32 shows.
template <typename T>
__device__ __forceinline__ float sigmoid_for(float z) {
  return sizeof(T) == 4 ? 1.0f / (1.0f + expf(-z)) : sigmoid_of(z);
}

// z = gate(z)
template <typename T, int N>
__device__ __forceinline__ void apply_gate(float (&z)[N], Activation gate) {
  if (gate == Activation::kSigmoid) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = sigmoid_for<T>(z[i]);
  } else if (gate == Activation::kHardsigmoid) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = clamp(z[i] + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
  }
}

// gate'(z), as aten has it.
template <typename T>
__device__ __forceinline__ float slope_of(float z, Activation gate) {
  if (gate == Activation::kSigmoid) {
    const float s = sigmoid_for<T>(z);
    return s * (1.0f - s);
  }
  if (gate == Activation::kHardsigmoid) return z > -3.0f && z < 3.0f ? 1.0f / 6.0f : 0.0f;
  return 1.0f;
}

// The factors of N channels, and what is added to each of their values. -0 changes no value.
template <typename T, int N>
struct Terms {
  float factor[N], added[N];

  __device__ __forceinline__ Terms(const ChannelScaleParams& p, int64_t plane) {
    load_gates<T>(p, plane, factor);
    if (p.spread != nullptr) load(static_cast<const T*>(p.spread) + plane, added);
    apply_gate<T>(factor, p.activation);
    const auto pixels = static_cast<float>(p.pixels);
#pragma unroll
    for (int i = 0; i < N; ++i) added[i] = p.spread == nullptr ? -0.0f : added[i] / pixels;
  }
};

}  // namespace channel_scale
}  // namespace dwswap
