// How channel_sums cuts a problem into threads and blocks.
#pragma once

#include "depthwise_conv2d/backward/split.h"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace channel_sums {

constexpr int kMostVectors = 32;  // of a block: a run of memory of 64 to 256 bytes

// Channels of a thread at most: an access. In float32, which has every sum twice, two of them would
// take too many registers but for 3 x 3 taps.
constexpr int most_channels(int64_t kernel, int64_t element_bytes) {
  return kernel >= 5 && element_bytes == 4 ? 1 : 2;
}

constexpr int kThreads = 128;  // of a block

// Blocks of a multiprocessor: the sums of a thread take its registers.
constexpr int resident_blocks(int64_t kernel, int64_t stride, int64_t channels,
                              int64_t element_bytes) {
  if (element_bytes == 4) return kernel == 7 ? 3 : 4;
  if (kernel == 3) return stride == 1 ? 5 : 7;
  return channels == 2 && !(kernel == 5 && stride == 2) ? 3 : 4;
}

// Of grad_output, per thread.
constexpr int columns_of(int64_t kernel, int64_t stride) {
  if (stride == 1) return kernel == 7 ? 2 : 4;
  return kernel == 7 ? 1 : 2;
}

struct Cut {
  int channels;         // of a thread: one access
  int vectors, slices;  // accesses of a block side by side, and blocks that hold all channels
  int groups;           // threads of a block with the same channels
  Split split;
};

// The cut of a problem, for as wide accesses as both images are aligned to.
Cut choose_cut(const GradientParams& params, int multiprocessors);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const GradientParams& params, const Cut& cut, cudaStream_t stream);

}  // namespace channel_sums
}  // namespace dwswap
