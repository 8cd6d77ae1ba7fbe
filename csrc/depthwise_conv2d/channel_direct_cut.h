// How channel_direct cuts a problem into threads.
#pragma once

#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace channel_direct {

constexpr int kKernel = 3;
constexpr int kThreads = 128;  // of a block
constexpr int kMostChannels = 2;

// Of a thread: taps, sums and two rows of input share its registers.
constexpr int columns_of(int64_t stride) { return stride == 1 ? 4 : 2; }

// What a thread has: so many channels, and rows of output of columns_of(stride) columns.
struct Cut {
  int channels;  // 2 or 1: one access
  int rows;

  int64_t threads(const DepthwiseConv2dParams& p) const {
    return p.batch * ceil_div(p.channels, channels) * ceil_div(p.out_w, columns_of(p.stride_w)) *
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
