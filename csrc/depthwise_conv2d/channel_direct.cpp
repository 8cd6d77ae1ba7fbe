#include <algorithm>
#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "depthwise_conv2d/channel_direct_cut.h"

namespace dwswap {

bool covers_channel_direct(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  constexpr int kKernel = channel_direct::kKernel;
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kChannelsLast || p.out_layout != Layout::kChannelsLast) return false;
  if (p.multiplier != 1 || p.is_dilated()) return false;
  if (p.kernel_h != kKernel || p.kernel_w != kKernel) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  // Rows and columns, with padding and what a thread runs over, and offsets within a row are
  // 32-bit; so are indices of threads.
  if (p.in_h > kLimit / 4 || p.padding_h > kLimit / 8) return false;
  if (p.in_w > kLimit / 4 || p.padding_w > kLimit / 8) return false;
  if (p.channels > kLimit / 16 || p.channels > kLimit / std::max(p.in_w, p.out_w)) return false;
  const int element_bytes = bytes_of(p.dtype);
  const auto cut = channel_direct::choose_cut(p, element_bytes, current_device().multiprocessors);
  return cut.threads(p) <= kLimit - channel_direct::kThreads;
}

cudaError_t launch_channel_direct(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_fast_type(p.dtype, [&]<typename T>() {
    return channel_direct::launch_typed<T>(p, device.multiprocessors, stream);
  });
}

}  // namespace dwswap
