#include <limits>

#include "depthwise_conv2d/toeplitz_cut.h"

namespace dwswap {

bool covers_toeplitz(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  if (!is_half(p.dtype)) return false;
  if (p.in_layout != p.out_layout || p.in_layout == Layout::kStrided || p.multiplier != 1)
    return false;
  if (p.stride_w > 2 || p.stride_h > kLimit || toeplitz::choose_steps(p) == 0) return false;
  if (p.in_layout == Layout::kChannelsLast) {
    const auto addresses = reinterpret_cast<uintptr_t>(p.input) |
                           reinterpret_cast<uintptr_t>(p.output) |
                           reinterpret_cast<uintptr_t>(p.input_bias);
    if (p.channels % toeplitz::kGroup != 0 || addresses % 16 != 0) return false;
  }
  // Units, their rows and columns are counted, and offsets in a plane are reckoned, in 32 bits.
  if (p.batch * p.channels > kLimit || p.batch * p.out_h * p.out_w > kLimit) return false;
  if ((p.in_h + 2 * p.padding_h) * (p.in_w + 2 * p.padding_w) > kLimit) return false;
  if (p.channels * p.in_h * p.in_w > kLimit || p.channels * p.out_h * p.out_w > kLimit)
    return false;
  return toeplitz::choose_cut(p, current_device()).rows != 0;
}

cudaError_t launch_toeplitz(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  const toeplitz::Cut cut = toeplitz::choose_cut(p, device);
  return visit_half_type(p.dtype, [&]<typename T>() {
    return p.stride_w == 1 ? toeplitz::launch_cut<T, 1>(p, cut, device, stream)
                           : toeplitz::launch_cut<T, 2>(p, cut, device, stream);
  });
}

}  // namespace dwswap
