// How channel_sums cuts a problem into threads and blocks.
#pragma once

#include "depthwise_conv2d/backward/split.h"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace channel_sums {

constexpr int kMostVectors = 32;  // of a block: a run of memory of 64 to 256 bytes

// Channels of a thread at most: an access. Of 7 x 7 taps in float32, two would take too many
// registers.
constexpr int most_channels(int64_t kernel, int64_t element_bytes) {
  return kernel == 7 && element_bytes == 4 ? 1 : 2;
}

// Of a block, and blocks of a multiprocessor: the sums of a thread take its registers.
constexpr int threads_of(int64_t kernel) { return kernel == 3 ? 256 : 128; }
constexpr int resident_blocks(int64_t kernel, int64_t channels) {
  return kernel == 3 ? 2 : channels == 2 ? 3 : 4;
}

// Of grad_output, per thread.
constexpr int columns_of(int64_t kernel, int64_t stride) {
  return kernel == 3 ? (stride == 1 ? 4 : 2) : kernel == 5 && stride == 1 ? 2 : 1;
}

struct Cut {
  int channels;         // of a thread: one access
  int vectors, slices;  // accesses of a block side by side, and blocks that hold all channels
  int groups;           // threads of a block with the same channels
  Split split;
};

// The cut of a problem, for as wide accesses as both images are aligned to.
Cut choose_cut(const GradientParams& params, int multiprocessors);

}  // namespace channel_sums
}  // namespace dwswap
