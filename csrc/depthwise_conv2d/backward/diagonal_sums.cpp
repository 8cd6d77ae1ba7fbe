#include "depthwise_conv2d/backward/diagonal_sums_cut.h"
#include "depthwise_conv2d/backward/strips.h"

namespace dwswap {

bool covers_diagonal_sums(const GradientParams& p) {
  if (!is_half(p.dtype) || p.kernel_h == 3) return false;
  if (p.stride_w == 2 && p.in_w == 1) return false;  // there are no odd columns
  return reads_strips(p);
}

int64_t diagonal_sums_workspace_bytes(const GradientParams& p) {
  return sums_bytes(p, diagonal_sums::choose_cut(p, current_device()).split.shares);
}

cudaError_t launch_diagonal_sums(const GradientParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_half_type(
      p.dtype, [&]<typename T>() { return diagonal_sums::launch_typed<T>(p, device, stream); });
}

}  // namespace dwswap
