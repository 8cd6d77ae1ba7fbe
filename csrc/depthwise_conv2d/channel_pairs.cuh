// What a thread that owns neighbouring channels reads, in channels_last.
#pragma once

#include "common/numeric.cuh"

namespace dwswap {

// The weights of CHANNELS: TAPS of the first, then TAPS of the next; each last one first, where
// `reversed`.
template <int CHANNELS, int TAPS, typename T>
__device__ __forceinline__ void load_taps(const T* source, float (&taps)[CHANNELS][TAPS],
                                          bool reversed = false) {
#pragma unroll
  for (int i = 0; i < CHANNELS * TAPS; i += CHANNELS) {
    float raw[CHANNELS];
    load(source + i, raw);
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) taps[(i + e) / TAPS][(i + e) % TAPS] = raw[e];
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) reverse_where(reversed, taps[c]);
}

// Behind a branch that is seldom taken; written as C++, it would be selected in every row.
template <int N, typename T>
__device__ __forceinline__ void set(Words<T, N>& words, const Words<T, N>& values) {
#pragma unroll
  for (int i = 0; i < Words<T, N>::kWords; ++i)
    asm volatile("mov.b32 %0, %1;" : "=r"(words.data[i]) : "r"(values.data[i]));
}

// Bit i: column first + i is one of `size`, or none of the `used` ones that count.
template <int COLUMNS>
__device__ __forceinline__ uint32_t columns_inside(int first, int size, int used) {
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    if (static_cast<unsigned>(first + i) < static_cast<unsigned>(size) || i >= used)
      inside |= 1u << i;
  }
  return inside;
}

}  // namespace dwswap
