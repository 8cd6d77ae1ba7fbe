#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/channel_columns_cut.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {

bool covers_channel_columns(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kChannelsLast || p.out_layout != Layout::kChannelsLast) return false;
  if (p.multiplier != 1 || p.is_dilated()) return false;
  if (p.kernel_h != channel_columns::kKernel || p.kernel_w != channel_columns::kKernel)
    return false;
  const int element_bytes = bytes_of(p.dtype);
  if (p.stride_h != p.stride_w || !channel_columns::is_compiled(p.stride_h, element_bytes))
    return false;
  const Device device = current_device();
  if (!reads_boxes(device) || !readable_in_boxes(p, element_bytes)) return false;
  // A thread owns a pair of channels.
  const auto vectors = reinterpret_cast<uintptr_t>(p.bias) |
                       reinterpret_cast<uintptr_t>(p.input_bias) |
                       reinterpret_cast<uintptr_t>(p.output);
  if (vectors % (2 * element_bytes) != 0) return false;
  // At least 8 channels, one row and 4 columns per block.
  if (p.batch * ceil_div(p.channels, 8) * ceil_div(p.out_w, 4) * p.out_h > kLimit) return false;
  return p.channels <= kLimit / 64 && p.in_h + 2 * p.padding_h <= kLimit / 2 &&
         p.in_w + 2 * p.padding_w <= kLimit / 2;
}

cudaError_t launch_channel_columns(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_fast_type(p.dtype, [&]<typename T>() {
    return channel_columns::launch_typed<T>(p, device.multiprocessors, stream);
  });
}

}  // namespace dwswap
