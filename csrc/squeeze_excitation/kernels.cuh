// Squeeze-and-excitation in two launches, neither with atomics, so the results are the same in
// every run. Every sample goes through both layers by itself: of many, batched.cuh is faster.
//
//   squeeze_kernel   pools its channels and pixels, and goes through `reduce` with what it has.
//                    Reducing is linear, so the sums of all blocks are the hidden units:
//                    partials[n, part, h] = sum over c of its slice of
//                                           reduce_weight[h, c] * (sum over its pixels of x) /
//                                           pixels
//   excite_kernel    adds the parts up, computes the gates of its own channels, and scales:
//                    hidden[h] = activation(reduce_bias[h] +
//                                           sum over parts of partials[n, part, h])
//                    y = x * gate(expand_bias[c] + sum over h of expand_weight[c, h] * hidden[h])
//
// A block reads only its slice of either weight, and reads it from L1 for all samples but the
// first. All sums, the hidden units and the gates are float32; the result is rounded once.
#pragma once

#include "common/planes.cuh"
#include "common/sum.cuh"
#include "squeeze_excitation/activated.cuh"
#include "squeeze_excitation/params.h"

namespace dwswap {

// Those of the part that a block has of a sample.
template <int V, bool kChannelsLast>
struct ThreadShare : Vectors<V> {
  static constexpr int kThreads = ExcitationTile::kThreads;
  using Vectors<V>::base, Vectors<V>::first, Vectors<V>::last, Vectors<V>::step, Vectors<V>::pitch;
  int channel;  // the first, counted from the first of the block

  __device__ __forceinline__ ThreadShare(const SqueezeExcitationParams& p,
                                         const ExcitationCut& cut) {
    const int thread = static_cast<int>(threadIdx.x);
    const int channel0 = static_cast<int>(blockIdx.x) % cut.slices * cut.slice;
    const int pixel0 = static_cast<int>(blockIdx.x) / cut.slices * cut.chunk;
    const int channels = min(cut.slice, p.channels - channel0);
    last = min(pixel0 + cut.chunk, p.pixels);
    bool active;
    if constexpr (kChannelsLast) {
      const int columns = cut.slice / V, row = thread / columns;
      step = kThreads / columns, pitch = p.channels;
      channel = thread % columns * V;
      first = pixel0 + row;
      base = channel0 + channel;
      active = row < step && channel < channels;
    } else {
      step = cut.lanes * V, pitch = 1;
      channel = thread / cut.lanes;
      first = pixel0 + thread % cut.lanes * V;
      base = (channel0 + channel) * p.pixels;
      active = channel < channels;
    }
    if (!active) first = last;
  }
};

// means[c] of the block's channels: the sums of its pixels, divided by all pixels. The block is
// synchronized before they are written and after.
template <typename T, int V, bool kChannelsLast>
__device__ __forceinline__ void pool(const SqueezeExcitationParams& p, const ExcitationCut& cut,
                                     const ThreadShare<V, kChannelsLast>& share, const T* sample,
                                     float (&means)[ExcitationTile::kMostSlice]) {
  constexpr int kThreads = ExcitationTile::kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  sum_t<T> sums[V];
  for_each_vector(share, sample, [&](int, const Words<T, V>& words) {
    float x[V];
    widen_all(words, x);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i].add(x[i]);
  });
  const auto pixels = static_cast<float>(p.pixels);
  if constexpr (kChannelsLast) {
    // Padded so that V neighbouring channels are in different banks.
    constexpr int kPitch = kThreads + 32 / V;
    __shared__ float rows[V * kPitch];
#pragma unroll
    for (int i = 0; i < V; ++i) rows[i * kPitch + thread] = sums[i].value();
    __syncthreads();
    if (thread < cut.slice) {
      const int columns = cut.slice / V;
      const float* column = rows + thread % V * kPitch + thread / V;
      sum_t<T> total;
#pragma unroll 4
      for (int row = 0; row < share.step; ++row) total.add(column[row * columns]);
      means[thread] = total.value() / pixels;
    }
  } else {
#pragma unroll
    for (int i = 1; i < V; ++i) sums[0].add(sums[i]);
    const float total = sum_over_lanes(sums[0], cut.lanes);
    __syncthreads();
    if (thread % cut.lanes == 0 && share.channel < cut.slice) means[share.channel] = total / pixels;
  }
  __syncthreads();
}

// The part of `lane` in sum over c of row[c] * means[c], by vectors of V weights.
template <int V, typename T>
__device__ __forceinline__ sum_t<T> partial_product(
    const T* row, const float (&means)[ExcitationTile::kMostSlice], int channels, int lane) {
  sum_t<T> sum;
#pragma unroll 1
  for (int c = lane * V; c < channels; c += ExcitationTile::kReduceLanes * V) {
    float weights[V];
    load(row + c, weights);
#pragma unroll
    for (int i = 0; i < V; ++i) sum.add(weights[i] * means[c + i]);
  }
  return sum;
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(ExcitationTile::kThreads, ExcitationTile::kBlocks)
    squeeze_kernel(const SqueezeExcitationParams p, const ExcitationCut cut) {
  constexpr int kLanes = ExcitationTile::kReduceLanes;
  constexpr int kRows = ExcitationTile::kThreads / kLanes;
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  __shared__ float means[ExcitationTile::kMostSlice];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int channel0 = static_cast<int>(blockIdx.x) % cut.slices * cut.slice;
  const int channels = min(cut.slice, p.channels - channel0);
  const ThreadShare<V, kChannelsLast> share(p, cut);
  const auto* input = static_cast<const T*>(p.input);
  const T* weight = static_cast<const T*>(p.reduce_weight) + channel0;
  const int first = static_cast<int>(blockIdx.y) * cut.samples;
  const int last = min(first + cut.samples, p.batch);

  for (int n = first; n < last; ++n) {
    pool(p, cut, share, input + elements_before(p, n), means);
    float* partials = p.partials + (int64_t{n} * cut.parts() + blockIdx.x) * p.hidden;
#pragma unroll 1
    for (int h0 = 0; h0 < p.hidden; h0 += kRows) {
      const int h = h0 + thread / kLanes;
      sum_t<T> sum;
      if (h < p.hidden) {
        const T* row = weight + h * p.channels;
        sum = cut.wide_weights ? partial_product<kWide>(row, means, channels, lane)
                               : partial_product<1>(row, means, channels, lane);
      }
      const float total = sum_over_lanes(sum, kLanes);
      if (h < p.hidden && lane == 0) partials[h] = total;
    }
  }
}

// hidden[h] of one sample. The block is synchronized after they are written.
template <typename T>
__device__ __forceinline__ void add_parts(const SqueezeExcitationParams& p,
                                          const ExcitationCut& cut, int n,
                                          float (&hidden)[kMostHidden]) {
  constexpr int kThreads = ExcitationTile::kThreads;
  __shared__ float sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int width = min(p.hidden, kThreads), groups = kThreads / width, group = thread / width;
  const int parts = cut.parts();
  const float* partials = p.partials + int64_t{n} * parts * p.hidden;
  const auto* bias = static_cast<const T*>(p.reduce_bias);
#pragma unroll 1
  for (int h0 = 0; h0 < p.hidden; h0 += width) {
    const int h = h0 + thread % width;
    sum_t<T> sum;
    if (group < groups && h < p.hidden) {
#pragma unroll 4
      for (int part = group; part < parts; part += groups) sum.add(partials[part * p.hidden + h]);
    }
    sums[thread] = sum.value();
    __syncthreads();
    if (thread < width && h < p.hidden) {
      sum_t<T> total;
#pragma unroll 4
      for (int i = 0; i < groups; ++i) total.add(sums[i * width + thread]);
      if (bias != nullptr) total.add(widen(bias[h]));
      hidden[h] = activated(total.value(), p.activation);
    }
    __syncthreads();
  }
}

// scales[c] of the block's channels for one sample. The block is synchronized after they are
// written.
template <typename T>
__device__ __forceinline__ void expand(const SqueezeExcitationParams& p, int channel0, int channels,
                                       const float (&hidden)[kMostHidden],
                                       float (&scales)[ExcitationTile::kMostSlice]) {
  constexpr int kLanes = ExcitationTile::kExpandLanes;
  const int thread = static_cast<int>(threadIdx.x);
  const int channel = thread / kLanes, lane = thread % kLanes;
  const auto* bias = static_cast<const T*>(p.expand_bias);
  sum_t<T> sum;
  if (channel < channels) {
    const T* row = static_cast<const T*>(p.expand_weight) + (channel0 + channel) * p.hidden;
#pragma unroll 4
    for (int h = lane; h < p.hidden; h += kLanes) sum.add(widen(row[h]) * hidden[h]);
  }
  if (bias != nullptr && channel < channels && lane == 0) sum.add(widen(bias[channel0 + channel]));
  const float total = sum_over_lanes(sum, kLanes);
  if (channel < channels && lane == 0) scales[channel] = activated(total, p.gate);
  __syncthreads();
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(ExcitationTile::kThreads, ExcitationTile::kBlocks)
    excite_kernel(const SqueezeExcitationParams p, const ExcitationCut cut) {
  __shared__ float hidden[kMostHidden];
  __shared__ float scales[ExcitationTile::kMostSlice];
  const int channel0 = static_cast<int>(blockIdx.x) % cut.slices * cut.slice;
  const int channels = min(cut.slice, p.channels - channel0);
  const ThreadShare<V, kChannelsLast> share(p, cut);
  // The last samples first: they were read last, and what the L2 cache still has is theirs.
  const int first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * cut.samples;
  const int last = min(first + cut.samples, p.batch);

  for (int n = last - 1; n >= first; --n) {
    add_parts<T>(p, cut, n, hidden);
    expand<T>(p, channel0, channels, hidden, scales);
    float scale[V];
#pragma unroll
    for (int i = 0; i < V; ++i) scale[i] = scales[share.channel + (kChannelsLast ? i : 0)];
    const int64_t sample = elements_before(p, n);
    T* target = static_cast<T*>(p.output) + sample + share.base;
    for_each_vector(share, static_cast<const T*>(p.input) + sample,
                    [&](int pixel, const Words<T, V>& words) {
                      float x[V];
                      widen_all(words, x);
#pragma unroll
                      for (int i = 0; i < V; ++i) x[i] *= scale[i];
                      store(target + pixel * share.pitch, x);
                    });
  }
}

}  // namespace dwswap
