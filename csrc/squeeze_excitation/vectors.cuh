// How the squeeze_excitation kernels go over planes.
#pragma once

#include "common/numeric.cuh"
#include "squeeze_excitation/params.h"

namespace dwswap {

__device__ __forceinline__ int64_t elements_before(const SqueezeExcitationParams& p, int sample) {
  return int64_t{sample} * (p.channels * p.pixels);
}

// The vectors of V elements that one thread reads in a sample: consecutive channels of a pixel in
// channels_last, consecutive pixels of a plane otherwise.
template <int V>
struct Vectors {
  int base;         // of the first channel, counted from the first element of the sample
  int first, last;  // pixels
  int step, pitch;  // pixels from vector to vector, elements from pixel to pixel
};

// visit(pixel, words) for the vectors of the thread, of which kUnroll are read at a time.
template <typename T, int V, typename Visit>
__device__ __forceinline__ void for_each_vector(const Vectors<V>& share, const T* sample,
                                                Visit&& visit) {
  constexpr int kUnroll = ExcitationTile::kUnroll;
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

}  // namespace dwswap
