// How kernels go over planes.
#pragma once

#include <cuda_runtime.h>

#include "common/numeric.cuh"
#include "common/planes.h"

namespace dwswap {

__device__ __forceinline__ int64_t elements_before(const Planes& p, int64_t sample) {
  return sample * (p.channels * p.pixels);
}

// The vectors of V elements that one thread reads in a sample: consecutive channels of a pixel in
// channels_last, consecutive pixels of a plane otherwise.
template <int V>
struct Vectors {
  int base;         // of the first channel, counted from the first element of the sample
  int first, last;  // pixels
  int step, pitch;  // pixels from vector to vector, elements from pixel to pixel
};

// visit(pixel, words) for the vectors of the thread, of which kPlaneUnroll are read at a time.
template <typename T, int V, typename Visit>
__device__ __forceinline__ void for_each_vector(const Vectors<V>& share, const T* sample,
                                                Visit&& visit) {
  constexpr int kUnroll = kPlaneUnroll;
  const T* source = sample + share.base;
#pragma unroll 1
  for (int pixel = share.first; pixel < share.last; pixel += kUnroll * share.step) {
    Words<T, V> words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = pixel + i * share.step;
      if (at < share.last) words[i] = load_words<V>(source + at * share.pitch);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = pixel + i * share.step;
      if (at < share.last) visit(at, words[i]);
    }
  }
}

struct PlaneTile {
  static constexpr int kThreads = 256;
  // 4 x 256 threads x 4 loads x 16 bytes = 64 KiB under way.
  static constexpr int kBlocks = 4;
};

// contiguous: threads that share a plane. A small one has less than a warp.
__host__ __device__ inline int lanes_of_plane(int32_t pixels) { return pixels <= 256 ? 8 : 32; }

// channels_last: threads of a warp along the channels, together 128 bytes; the others are along the
// pixels.
template <int V>
inline constexpr int kColumns = V == 1 ? 32 : 8;

// The groups of threads that have whole planes: of kColumns * V channels in channels_last, of one
// otherwise.
template <int V, bool kChannelsLast>
__host__ __device__ inline int64_t plane_groups(const Planes& p) {
  constexpr int kSlice = kColumns<V> * V;
  return int64_t{p.batch} * (kChannelsLast ? (p.channels + kSlice - 1) / kSlice : p.channels);
}
// The least threads of a group.
template <bool kChannelsLast>
__host__ __device__ inline int group_threads(const Planes& p) {
  return kChannelsLast ? 32 : lanes_of_plane(p.pixels);
}

template <int V, bool kChannelsLast>
struct PlaneShare : Vectors<V> {
  int64_t sample;
  int channel;
  int lane;  // 0: the thread answers for the planes
  bool active;

  // `thread` of the `threads` of `group`, counted over all samples.
  __device__ __forceinline__ PlaneShare(const Planes& p, int64_t group, int thread, int threads) {
    if constexpr (kChannelsLast) {
      constexpr int kSlice = kColumns<V> * V;
      const int slices = (p.channels + kSlice - 1) / kSlice;
      sample = group / slices;
      channel = static_cast<int>(group % slices) * kSlice + thread % kColumns<V> * V;
      lane = thread / kColumns<V>;
      this->base = channel, this->pitch = p.channels;
      this->first = lane, this->step = threads / kColumns<V>;
    } else {
      sample = group / p.channels;
      channel = static_cast<int>(group % p.channels);
      lane = thread;
      this->base = channel * p.pixels, this->pitch = 1;
      this->first = lane * V, this->step = threads * V;
    }
    active = group >= 0 && sample < p.batch && channel < p.channels;
    this->last = active ? p.pixels : this->first;
  }

  // Of the first channel in (batch, channels).
  __device__ __forceinline__ int64_t place(const Planes& p) const {
    return sample * p.channels + channel;
  }
};

}  // namespace dwswap
