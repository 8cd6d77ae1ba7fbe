#include <algorithm>
#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/channel_tiles_cut.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace {

// Of pixels: with a dilation like this the largest tile is still a box.
constexpr int kMostBoxStep = 4;
constexpr int kMostTile =
    channel_tiles::kMostGroups * channel_tiles::kColumns - 1 + channel_tiles::kMostKernel;
static_assert(Box::extent(kMostTile, kMostBoxStep) <= kMostBoxElements);

channel_tiles::Reader choose_reader(const DepthwiseConv2dParams& p, const Device& device) {
  const auto pixel = static_cast<uint64_t>(p.channels) * bytes_of(p.dtype);
  const auto alignment =
      reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.input_bias) | pixel;
  const int bytes = alignment % 16 == 0 ? 16 : alignment % 8 == 0 ? 8 : 4;
  const bool bulk = reads_boxes(device) && readable_in_boxes(p, bytes_of(p.dtype)) &&
                    std::max(p.dilation_h, p.dilation_w) <= kMostBoxStep;
  return {bulk, bytes};
}

}  // namespace

bool covers_channel_tiles(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kChannelsLast || p.out_layout != Layout::kChannelsLast) return false;
  if (p.multiplier != 1) return false;
  if (p.kernel_h != p.kernel_w || (p.kernel_h != 3 && p.kernel_h != 5 && p.kernel_h != 7))
    return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.is_dilated() && p.stride_h != 1) return false;
  if (p.dilation_h > p.out_h || p.dilation_w > p.out_w) return false;
  // A thread owns a pair of channels.
  const int pair_bytes = 2 * bytes_of(p.dtype);
  const auto addresses =
      reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.output) |
      reinterpret_cast<uintptr_t>(p.bias) | reinterpret_cast<uintptr_t>(p.input_bias);
  if (p.channels % 2 != 0 || addresses % pair_bytes != 0) return false;
  // At least 4 pairs of channels (or all), 7 columns and a row per block.
  const DepthwiseConv2dParams lattice = channel_tiles::lattice_of(p);
  const int64_t rows = lattice.batch * lattice.out_h;
  const int64_t tiles = ceil_div(lattice.out_w, channel_tiles::kColumns);
  if (p.channels > kLimit / 64 || rows > kLimit / (tiles * ceil_div(p.channels, 8))) return false;
  return p.in_h + 2 * p.padding_h <= kLimit / 2 && p.in_w + 2 * p.padding_w <= kLimit / 2;
}

cudaError_t launch_channel_tiles(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  const channel_tiles::Reader reader = choose_reader(p, device);
  return visit_fast_type(p.dtype, [&]<typename T>() {
    return channel_tiles::launch_typed<T>(p, reader, device.multiprocessors, stream);
  });
}

}  // namespace dwswap
