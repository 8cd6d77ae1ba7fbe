#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "depthwise_conv2d/rolling_rows_cut.h"

namespace dwswap {

namespace rolling_rows {

namespace {

// Outputs of a multiprocessor below which threads of one row are faster. Deep ones load less, and
// of a large kernel that is worth more than many threads; with stride 2 windows share few rows.
int64_t few_outputs(const DepthwiseConv2dParams& p) {
  const bool is_float = p.dtype == DataType::kFloat32;
  if (p.is_dilated()) return 600;
  if (p.kernel_h * p.kernel_w <= 9) return is_float ? 450 : 550;
  return p.stride_h > 1 ? 260 : is_float ? 200 : 100;
}

}  // namespace

Depth choose_depth(const DepthwiseConv2dParams& p) {
  const bool dilated = p.is_dilated();
  if (dilated && (p.stride_h != 1 || p.dilation_h > p.out_h)) return Depth::kFlat;
  return p.outputs() < few_outputs(p) * current_device().multiprocessors ? Depth::kFlat
                                                                         : Depth::kDeep;
}

}  // namespace rolling_rows

bool covers_rolling_rows(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kContiguous || p.out_layout != Layout::kContiguous) return false;
  if (p.stride_h != p.stride_w) return false;
  int rows = 0;
  rolling_rows::visit<float>(p, [&]<typename Traits>() { rows = Traits::kRows; });
  if (rows == 0) return false;
  // Offsets within a plane, with padding and the rows that a thread runs over, and thread indices
  // are 32-bit.
  constexpr int64_t kMostDilation = 1 << 16;
  if (p.dilation_h > kMostDilation || p.dilation_w > kMostDilation) return false;
  const int64_t in_plane =
      (p.in_h + 2 * p.padding_h + (rows * p.stride_h + p.kernel_h) * p.dilation_h) *
      (p.in_w + 2 * p.padding_w);
  const int64_t out_plane = (p.out_h + rows * p.dilation_h) * p.out_w;
  const int64_t strips = rolling_rows::strips_of(p, rows);
  return in_plane <= kLimit && out_plane <= kLimit &&
         p.batch * p.out_channels() * strips * p.out_w <= kLimit;
}

cudaError_t launch_rolling_rows(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  return visit_fast_type(
      params.dtype, [&]<typename T>() { return rolling_rows::launch_typed<T>(params, stream); });
}

}  // namespace dwswap
