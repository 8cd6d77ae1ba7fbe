#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/rolling_rows_cut.h"

namespace dwswap {

bool covers_rolling_rows(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kContiguous || p.out_layout != Layout::kContiguous) return false;
  if (p.stride_h != p.stride_w) return false;
  const rolling_rows::Cut cut = rolling_rows::cut_of(p, static_cast<int>(bytes_of(p.dtype)),
                                                     current_device().multiprocessors);
  if (cut.rows == 0) return false;
  // Offsets within a plane, with padding and the rows that a thread runs over, and thread indices
  // are 32-bit.
  constexpr int64_t kMostDilation = 1 << 16;
  if (p.dilation_h > kMostDilation || p.dilation_w > kMostDilation) return false;
  const int64_t in_plane =
      (p.in_h + 2 * p.padding_h + (cut.rows * p.stride_h + p.kernel_h) * p.dilation_h) *
      (p.in_w + 2 * p.padding_w);
  const int64_t out_plane = (p.out_h + cut.rows * p.dilation_h) * p.out_w;
  const int64_t threads = rolling_rows::strips_of(p, cut.rows) * ceil_div(p.out_w, cut.columns);
  return in_plane <= kLimit && out_plane <= kLimit &&
         p.batch * p.out_channels() * threads <= kLimit;
}

cudaError_t launch_rolling_rows(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  return visit_fast_type(
      params.dtype, [&]<typename T>() { return rolling_rows::launch_typed<T>(params, stream); });
}

}  // namespace dwswap
