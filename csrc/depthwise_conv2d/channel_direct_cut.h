// How channel_direct cuts a problem into threads.
#pragma once

#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace channel_direct {

constexpr int kKernel = 3;
constexpr int kThreads = 128;  // of a block
constexpr int kMostChannels = 2;

// What a thread has: so many channels, and rows of output of so many columns. Taps, sums and two
// rows of input share its registers.
struct Cut {
  int channels;  // 2 or 1: one access
  int columns;   // stride 1: 4. Stride 2: 2; 4 of two channels in float32, too
  int rows;

  int64_t threads(const DepthwiseConv2dParams& p) const {
    return p.batch * ceil_div(p.channels, channels) * ceil_div(p.out_w, columns) *
           ceil_div(p.out_h, rows);
  }
};

// The cut of a problem of 3 x 3 taps, for as wide accesses as all tensors are aligned to.
Cut choose_cut(const DepthwiseConv2dParams& params, int element_bytes, int multiprocessors);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, int multiprocessors,
                         cudaStream_t stream);

}  // namespace channel_direct
}  // namespace dwswap
