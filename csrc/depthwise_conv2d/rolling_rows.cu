#include "depthwise_conv2d/rolling_rows.cuh"

#include <limits>

namespace dwswap {

bool covers_rolling_rows(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout == Layout::kStrided || p.in_layout != p.out_layout) return false;
  if (p.stride_h != p.stride_w || p.dilation_h != 1 || p.dilation_w != 1) return false;

  bool covered = false;
  int vec = 1, rows = 1;
  rolling_rows::visit<float>(p, [&]<typename Traits>() {
    covered = true;
    vec = Traits::kVec;
    rows = Traits::kRows;
  });
  if (!covered) return false;

  const bool channels_last = p.in_layout == Layout::kChannelsLast;
  if (channels_last && (p.multiplier != 1 || p.channels % vec != 0)) return false;
  const int64_t element = p.dtype == DataType::kFloat32 ? 4 : 2;
  const auto address = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.output);
  if (address % (vec * element) != 0) return false;

  // Offsets within an image (one padded row and column around it included) and thread indices are
  // 32-bit.
  const int64_t pixel = channels_last ? p.channels : 1;
  const int64_t strips = (p.out_h + rows - 1) / rows;
  const int64_t in_image = (p.in_h + 2 * p.padding_h + rows * p.stride_h) *
                           (p.in_w + 2 * p.padding_w) * pixel;
  const int64_t out_image = (p.out_h + rows) * p.out_w * pixel;
  const int64_t columns = p.batch * strips * p.out_w;
  return in_image <= kLimit && out_image <= kLimit &&
         columns * (channels_last ? 1 : p.out_channels()) <= kLimit &&
         (!channels_last || p.channels / vec / 4 < 65535);
}

cudaError_t launch_rolling_rows(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case DataType::kFloat32:
      return rolling_rows::launch_typed<float>(params, stream);
    case DataType::kFloat16:
      return rolling_rows::launch_typed<__half>(params, stream);
    case DataType::kBFloat16:
      return rolling_rows::launch_typed<__nv_bfloat16>(params, stream);
    case DataType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dwswap
