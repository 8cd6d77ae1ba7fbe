// Many sums over a warp at once.
#pragma once

#include <cuda_runtime.h>

namespace dwswap {

// The sums of a warp: lane i of 32 gets those of COUNT / 32 values, from i * COUNT / 32 on. With
// COUNT = 16 two lanes get the same one.
template <int COUNT>
__device__ __forceinline__ void add_up_warp(float (&x)[COUNT]) {
  static_assert(COUNT == 16 || COUNT == 32 || COUNT == 64, "16, 32 or 64");
  const int lane = threadIdx.x % 32;
  int held = COUNT;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (held == 1) {
      x[0] += __shfl_xor_sync(~0u, x[0], offset);
      continue;
    }
    held /= 2;
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if (i >= held) continue;
      const float given = upper ? x[i] : x[i + held];
      const float kept = upper ? x[i + held] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, given, offset);
    }
  }
}

}  // namespace dwswap
