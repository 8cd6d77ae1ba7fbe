// What a thread that owns two neighbouring channels reads from shared memory, in channels_last.
#pragma once

#include "common/numeric.cuh"

namespace dwswap {

// The weights of a pair: TAPS of the one channel, then TAPS of the other.
template <int TAPS, typename T>
__device__ __forceinline__ void load_pair_taps(const T* source, float (&taps)[2][TAPS]) {
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    float raw[2];
    load(source + 2 * i, raw);
#pragma unroll
    for (int e = 0; e < 2; ++e) taps[(2 * i + e) / TAPS][(2 * i + e) % TAPS] = raw[e];
  }
}

// The pair of channels of neighbouring pixels, `pitch` elements apart: x[2 * pixel + channel].
template <int N, typename T>
__device__ __forceinline__ void load_pairs(const T* source, int pitch, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2, source += pitch) {
    float value[2];
    load(source, value);
    x[i] = value[0], x[i + 1] = value[1];
  }
}

}  // namespace dwswap
