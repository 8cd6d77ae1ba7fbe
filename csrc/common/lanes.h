// How threads of a block lie along rows of memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integer.h"

namespace dwswap {

// How many of `threads` lie along a row of so many vectors: those with which the fewest threads of
// all blocks are idle, with 128 bytes and more side by side.
inline int choose_lanes(int64_t vectors, int vector_bytes, int threads) {
  constexpr int kRowBytes = 128, kFewRows = 4;  // fewer rows have little to add up in a block
  const int least = std::max(1, kRowBytes / vector_bytes);
  int lanes = static_cast<int>(std::min<int64_t>(vectors, threads / kFewRows));
  double best = 0.0;
  for (int candidate = lanes; candidate >= std::min(least, lanes); --candidate) {
    const double all = static_cast<double>(ceil_div(vectors, candidate)) * threads;
    const double busy = static_cast<double>(vectors) * (threads / candidate) / all;
    if (busy > best) best = busy, lanes = candidate;
  }
  return lanes;
}

}  // namespace dwswap
