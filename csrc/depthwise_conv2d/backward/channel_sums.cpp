#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "depthwise_conv2d/backward/channel_sums_cut.h"

namespace dwswap {

bool covers_channel_sums(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  if (!p.channels_last() || !sums_squares(p) || p.multiplier != 1) return false;
  // Rows and columns, with what a thread runs over, offsets within a few rows, and indices of
  // strips, of which dilation makes more.
  constexpr int64_t kOver = 32;
  const int64_t over_h = kOver * p.dilation_h, over_w = kOver * p.dilation_w;
  return p.in_h + p.padding_h + over_h <= kLimit &&
         p.dilation_h * p.channels * (p.in_w + p.padding_w + over_w) <= kLimit / 8 &&
         p.batch * (p.out_h + over_h) * (p.out_w + over_w) <= kLimit / 2;
}

int64_t channel_sums_workspace_bytes(const GradientParams& p) {
  return sums_bytes(p, channel_sums::choose_cut(p, current_device().multiprocessors).split.shares);
}

cudaError_t launch_channel_sums(const GradientParams& p, cudaStream_t stream) {
  const channel_sums::Cut cut = channel_sums::choose_cut(p, current_device().multiprocessors);
  return visit_fast_type(
      p.dtype, [&]<typename T>() { return channel_sums::launch_typed<T>(p, cut, stream); });
}

}  // namespace dwswap
