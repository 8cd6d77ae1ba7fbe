#include <limits>

#include "common/alignment.h"
#include "depthwise_conv2d/plane_bands_cut.h"

namespace dwswap {

bool covers_plane_bands(const DepthwiseConv2dParams& p) {
  // Columns of a tile, margins and rows behind the last one may reach past the end.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 4;
  if (!is_half(p.dtype)) return false;
  if (p.in_layout != Layout::kContiguous || p.out_layout != Layout::kContiguous) return false;
  if (p.multiplier != 1 || p.is_dilated()) return false;
  if (p.kernel_h != p.kernel_w || p.stride_h != p.stride_w) return false;
  if (!plane_bands::is_compiled(p)) return false;
  if (p.input_activation > Activation::kRelu6 || p.activation > Activation::kRelu6) return false;
  if (p.padding_h > p.kernel_h / 2 || p.padding_w > p.kernel_w / 2) return false;
  const Device device = current_device();
  if (!uses_bulk_copies(device)) return false;
  if (!aligned_to(kVectorBytes, 0, {p.input, p.output})) return false;
  const int64_t in_image = p.channels * p.in_h * p.in_w, out_image = p.channels * p.out_h * p.out_w;
  // Rows of the images of a product all begin at even elements, or all at odd ones.
  if (in_image % 2 != 0 || out_image % 2 != 0) return false;
  if (in_image > kLimit || out_image > kLimit || p.batch * p.channels * p.out_h > kLimit)
    return false;
  return plane_bands::choose_cut(p, device).rows != 0;
}

cudaError_t launch_plane_bands(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_half_type(
      p.dtype, [&]<typename T>() { return plane_bands::launch_typed<T>(p, device, stream); });
}

}  // namespace dwswap
