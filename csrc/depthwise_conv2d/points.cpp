#include "depthwise_conv2d/points.h"

#include <limits>

#include "common/data_type.h"

namespace dwswap {

bool covers_points(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64 || p.multiplier != 1) return false;
  if (p.kernel_h != points::kKernel || p.kernel_w != points::kKernel) return false;
  if (p.in_layout != p.out_layout || p.in_layout == Layout::kStrided) return false;
  // Places in the image, with its padding, and in the output are 32-bit; so are indices of threads.
  return p.is_padded_within(kLimit) &&
         p.batch * p.channels <= (kLimit - points::kThreads) / (p.out_h * p.out_w) &&
         p.channels <= kLimit / (points::kKernel * points::kKernel);
}

cudaError_t launch_points(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype, [&]<typename T>() { return points::launch_typed<T>(p, stream); });
}

}  // namespace dwswap
