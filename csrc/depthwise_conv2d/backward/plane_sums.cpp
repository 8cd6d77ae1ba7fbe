#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "depthwise_conv2d/backward/plane_sums_cut.h"

namespace dwswap {

bool covers_plane_sums(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  if (p.channels_last() || !sums_squares(p)) return false;
  // Offsets within a plane, with the rows and columns that a thread runs over, and indices of
  // columns, of which dilation makes more.
  const int64_t rows = (8 * p.stride_h + p.kernel_h) * p.dilation_h + p.padding_h;
  return (p.in_h + rows) * (p.in_w + p.padding_w + p.kernel_w * p.dilation_w) <= kLimit &&
         p.batch * (p.out_h + p.dilation_h) * p.out_w <= kLimit / 2 &&
         plane_sums::choose_cut(p, current_device().multiprocessors).shares * p.out_channels() <=
             kLimit;
}

int64_t plane_sums_workspace_bytes(const GradientParams& p) {
  return sums_bytes(p, plane_sums::choose_cut(p, current_device().multiprocessors).shares);
}

cudaError_t launch_plane_sums(const GradientParams& p, cudaStream_t stream) {
  const Split cut = plane_sums::choose_cut(p, current_device().multiprocessors);
  return visit_fast_type(p.dtype,
                         [&]<typename T>() { return plane_sums::launch_typed<T>(p, cut, stream); });
}

}  // namespace dwswap
