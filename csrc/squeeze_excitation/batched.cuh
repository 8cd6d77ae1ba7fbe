// Squeeze-and-excitation of many samples, whose layers are matrix products over all of them:
//
//   channel_means    means[n, c] = mean of x over the pixels
//                    hidden = means reduce_weight^T + reduce_bias            (aten::linear)
//   activate_kernel  hidden = activation(hidden)
//                    gate_inputs = hidden expand_weight^T + expand_bias      (aten::linear)
//   scale_kernel     y = x * gate(gate_inputs[n, c])
//
// What lies between kernels and products has the dtype of x, as aten has it; the gates are float32.
#pragma once

#include "common/planes.cuh"
#include "squeeze_excitation/activated.cuh"
#include "squeeze_excitation/params.h"

namespace dwswap {

__device__ __forceinline__ int64_t thread_of_grid() {
  return int64_t{blockIdx.x} * PlaneTile::kThreads + threadIdx.x;
}

template <typename T>
__global__ void activate_kernel(T* values, int64_t count, Activation activation) {
  const int64_t i = thread_of_grid();
  if (i < count) values[i] = narrow<T>(activated(widen(values[i]), activation));
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(PlaneTile::kThreads, PlaneTile::kBlocks)
    scale_kernel(const SqueezeExcitationParams p, const T* gate_inputs) {
  const int threads = group_threads<kChannelsLast>(p);
  const int64_t thread = thread_of_grid();
  // The last samples first: they were read last, and what the L2 cache still has is theirs.
  const PlaneShare<V, kChannelsLast> share(p,
                                           plane_groups<V, kChannelsLast>(p) - 1 - thread / threads,
                                           static_cast<int>(thread % threads), threads);
  if (!share.active) return;
  constexpr int kGates = kChannelsLast ? V : 1;
  float gates[kGates];
  load(gate_inputs + share.place(p), gates);
#pragma unroll
  for (int i = 0; i < kGates; ++i) gates[i] = activated(gates[i], p.gate);
  const int64_t sample = share.sample * (p.channels * p.pixels);
  T* target = static_cast<T*>(p.output) + sample + share.base;
  for_each_vector(share, static_cast<const T*>(p.input) + sample,
                  [&](int pixel, const Words<T, V>& words) {
                    float x[V];
                    widen_all(words, x);
#pragma unroll
                    for (int i = 0; i < V; ++i) x[i] *= gates[kChannelsLast ? i : 0];
                    store(target + pixel * share.pitch, x);
                  });
}

}  // namespace dwswap
