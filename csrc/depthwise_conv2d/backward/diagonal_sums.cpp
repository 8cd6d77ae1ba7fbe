#include <limits>

#include "depthwise_conv2d/backward/diagonal_sums_cut.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {

bool covers_diagonal_sums(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  constexpr uint64_t kCopyEngineBytes = 16;
  if (!is_half(p.dtype) || p.kernel_h == 3) return false;
  if (!p.channels_last() || !sums_squares(p) || p.multiplier != 1 || p.is_dilated()) return false;
  if (p.stride_w == 2 && p.in_w == 1) return false;  // there are no odd columns
  const uint64_t places = static_cast<uint64_t>(p.channels) * 2 |
                          reinterpret_cast<uintptr_t>(p.grad_output) |
                          reinterpret_cast<uintptr_t>(p.input);
  if (!reads_boxes(current_device()) || places % kCopyEngineBytes != 0) return false;
  // Walks and rows are counted in 32 bits.
  return p.batch * p.out_h * p.out_w <= kLimit && p.in_h + 2 * p.padding_h <= kLimit &&
         p.in_w + 2 * p.padding_w <= kLimit && p.channels <= kLimit;
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
