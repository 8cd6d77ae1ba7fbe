// How channel_columns cuts a problem into blocks and threads.
#pragma once

#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace channel_columns {

constexpr int kKernel = 3;
constexpr int kMaxThreads = 128;  // few warps meet at the end of a chunk
constexpr int kMaxStages = 4;
constexpr int kStageBytes = 96 * 1024;  // of all stages, before each is rounded up
constexpr int kMostShared = kStageBytes + kMaxStages * 128 +
                            2 * kMaxThreads * kKernel * kKernel * static_cast<int>(sizeof(float));

// In float32 with stride 2, channel_direct keeps up with a copy.
constexpr bool is_compiled(int64_t stride, int element_bytes) {
  return stride == 1 || (stride == 2 && element_bytes == 2);
}

// How a problem is cut.
struct Cut {
  int columns;  // of output, per thread: 7 or 4
  int pairs;    // of channels, per block
  int groups;   // threads of a pair, along the columns
  int rows;     // of output, per block
  int stages;

  int threads() const { return pairs * groups; }
};

// The cut of a problem that channel_columns covers; the search for it is remembered.
Cut choose_cut(const DepthwiseConv2dParams& params, int element_bytes, int multiprocessors);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, int multiprocessors,
                         cudaStream_t stream);

}  // namespace channel_columns
}  // namespace dwswap
