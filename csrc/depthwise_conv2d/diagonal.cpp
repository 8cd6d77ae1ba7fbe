#include <limits>

#include "depthwise_conv2d/diagonal_cut.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {

bool covers_diagonal(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  if (!is_half(p.dtype)) return false;
  if (p.in_layout != Layout::kChannelsLast || p.out_layout != Layout::kChannelsLast) return false;
  if (p.multiplier != 1 || p.is_dilated()) return false;
  if (p.kernel_h != p.kernel_w || (p.kernel_h != 5 && p.kernel_h != 7)) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.transforms_input()) return false;
  constexpr int kPairBytes = 4, kCopyEngineBytes = 16;
  if (!reads_boxes(current_device()) || !readable_in_boxes(p, 2) ||
      reinterpret_cast<uintptr_t>(p.output) % kCopyEngineBytes != 0 ||
      reinterpret_cast<uintptr_t>(p.bias) % kPairBytes != 0)
    return false;
  // Units are counted in 32 bits.
  if (p.batch * p.channels > kLimit || p.batch * p.out_h * p.out_w > kLimit) return false;
  if ((p.in_h + 2 * p.padding_h) * (p.in_w + 2 * p.padding_w) > kLimit) return false;
  return true;
}

cudaError_t launch_diagonal(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_half_type(
      p.dtype, [&]<typename T>() { return diagonal::launch_typed<T>(p, device, stream); });
}

}  // namespace dwswap
