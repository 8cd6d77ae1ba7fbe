// Many sums over a warp at once.
#pragma once

#include <cuda_runtime.h>

namespace dwswap {

// The sums over the lanes of a warp that are APART apart: of 32 / APART rows of them, row i gets
// those of COUNT * APART / 32 values, from i * COUNT * APART / 32 on. Of half as many values as
// rows two rows get the same one.
template <int APART = 1, int COUNT>
__device__ __forceinline__ void add_up_warp(float (&x)[COUNT]) {
  constexpr int ROWS = 32 / APART;
  static_assert(COUNT % ROWS == 0 || 2 * COUNT == ROWS, "as many values for each row");
  const int lane = threadIdx.x % 32;
  int held = COUNT;
#pragma unroll
  for (int offset = 16; offset >= APART; offset /= 2) {
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
