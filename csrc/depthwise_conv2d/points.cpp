#include "depthwise_conv2d/points.h"

#include <algorithm>
#include <limits>

#include "common/data_type.h"

namespace dwswap {

bool covers_points(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64 || p.multiplier != 1) return false;
  if (p.kernel_h != points::kKernel || p.kernel_w != points::kKernel) return false;
  if (p.in_layout != p.out_layout || p.in_layout == Layout::kStrided) return false;
  // Places in the image, with its padding, and in the output are 32-bit; so are indices of threads.
  if (!p.is_padded_within(kLimit)) return false;
  // Where a thread's second pixel is missing, its place is a stride behind the last pixel; those of
  // two pixels have strides of at most two dilations.
  const int64_t behind = p.channels * std::min(p.stride_w, 2 * p.dilation_w);
  const int64_t most = kLimit - points::kThreads - behind;
  return p.is_padded_within(most) && p.batch * p.channels <= most / (p.out_h * p.out_w) &&
         p.channels <= kLimit / (points::kKernel * points::kKernel);
}

cudaError_t launch_points(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype, [&]<typename T>() { return points::launch_typed<T>(p, stream); });
}

}  // namespace dwswap
