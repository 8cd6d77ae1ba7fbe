// Squeeze-and-excitation of many samples, whose layers are matrix products over all of them:
//
//   mean_kernel      means[n, c] = mean of x over the pixels
//                    hidden = means reduce_weight^T + reduce_bias            (aten::linear)
//   activate_kernel  hidden = activation(hidden)
//                    gate_inputs = hidden expand_weight^T + expand_bias      (aten::linear)
//   scale_kernel     y = x * gate(gate_inputs[n, c])
//
// What lies between kernels and products has the dtype of x, as aten has it; the gates are float32.
// A warp has whole planes, so no thread waits for those of other warps.
#pragma once

#include "squeeze_excitation/sums.cuh"
#include "squeeze_excitation/vectors.cuh"

namespace dwswap {

struct BatchedTile {
  static constexpr int kThreads = 256;
  // 4 x 256 threads x 4 loads x 16 bytes = 64 KiB under way.
  static constexpr int kBlocks = 4;
  static constexpr int kSmallPlane = 256;  // pixels of a plane that has less than a warp
};

// contiguous: threads that share a plane.
__host__ __device__ inline int lanes_of_plane(int32_t pixels) {
  return pixels <= BatchedTile::kSmallPlane ? 8 : 32;
}

// channels_last: threads of a warp along the channels, together 128 bytes; the others are along the
// pixels.
template <int V>
inline constexpr int kColumns = V == 1 ? 32 : 8;

// Those of whole planes: of V channels in channels_last, of one otherwise.
template <int V, bool kChannelsLast>
struct PlaneShare : Vectors<V> {
  int64_t sample;
  int channel;
  int lane;  // 0: the thread answers for the planes
  bool active;

  // group: of kColumns * V channels, or of one, counted over all samples.
  __device__ __forceinline__ PlaneShare(const SqueezeExcitationParams& p, int64_t group,
                                        int thread) {
    if constexpr (kChannelsLast) {
      constexpr int kSlice = kColumns<V> * V;
      const int slices = (p.channels + kSlice - 1) / kSlice;
      sample = group / slices;
      channel = static_cast<int>(group % slices) * kSlice + thread % kColumns<V> * V;
      lane = thread / kColumns<V>;
      this->base = channel, this->pitch = p.channels;
      this->first = lane, this->step = 32 / kColumns<V>;
    } else {
      sample = group / p.channels;
      channel = static_cast<int>(group % p.channels);
      lane = thread;
      this->base = channel * p.pixels, this->pitch = 1;
      this->first = lane * V, this->step = lanes_of_plane(p.pixels) * V;
    }
    active = group >= 0 && sample < p.batch && channel < p.channels;
    this->last = active ? p.pixels : this->first;
  }

  // Of the first channel in (batch, channels).
  __device__ __forceinline__ int64_t place(const SqueezeExcitationParams& p) const {
    return sample * p.channels + channel;
  }
};

// Threads of a group.
template <bool kChannelsLast>
__host__ __device__ inline int group_threads(const SqueezeExcitationParams& p) {
  return kChannelsLast ? 32 : lanes_of_plane(p.pixels);
}

template <int V, bool kChannelsLast>
__host__ __device__ inline int64_t groups_of(const SqueezeExcitationParams& p) {
  constexpr int kSlice = kColumns<V> * V;
  return int64_t{p.batch} * (kChannelsLast ? (p.channels + kSlice - 1) / kSlice : p.channels);
}

__device__ __forceinline__ int64_t thread_of_grid() {
  return int64_t{blockIdx.x} * BatchedTile::kThreads + threadIdx.x;
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(BatchedTile::kThreads, BatchedTile::kBlocks)
    mean_kernel(const SqueezeExcitationParams p, T* means) {
  const int threads = group_threads<kChannelsLast>(p);
  const int64_t thread = thread_of_grid();
  const PlaneShare<V, kChannelsLast> share(p, thread / threads, static_cast<int>(thread % threads));
  const T* sample = static_cast<const T*>(p.input) + share.sample * (p.channels * p.pixels);
  sum_t<T> sums[V];
  for_each_vector(share, sample, [&](int, const Words<T, V>& words) {
    float x[V];
    widen_all(words, x);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i].add(x[i]);
  });
  const auto pixels = static_cast<float>(p.pixels);
  constexpr int kResults = kChannelsLast ? V : 1;
  float results[kResults];
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int i = 0; i < V; ++i) results[i] = sum_over_lanes(sums[i], 32, kColumns<V>) / pixels;
  } else {
#pragma unroll
    for (int i = 1; i < V; ++i) sums[0].add(sums[i]);
    results[0] = sum_over_lanes(sums[0], threads) / pixels;
  }
  if (share.active && share.lane == 0) store(means + share.place(p), results);
}

template <typename T>
__global__ void activate_kernel(T* values, int64_t count, Activation activation) {
  const int64_t i = thread_of_grid();
  if (i < count) values[i] = narrow<T>(activated(widen(values[i]), activation));
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(BatchedTile::kThreads, BatchedTile::kBlocks)
    scale_kernel(const SqueezeExcitationParams p, const T* gate_inputs) {
  const int threads = group_threads<kChannelsLast>(p);
  const int64_t thread = thread_of_grid();
  // The last samples first: they were read last, and what the L2 cache still has is theirs.
  const PlaneShare<V, kChannelsLast> share(p, groups_of<V, kChannelsLast>(p) - 1 - thread / threads,
                                           static_cast<int>(thread % threads));
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
