// Which problems have a kernel, and the choice of its element type.
#include "separable_conv2d/launch.h"

#include <cstdint>
#include <limits>

#include "separable_conv2d/cut.h"
#include "separable_conv2d/params.h"

namespace dwswap {

bool covers_separable_conv2d(const SeparableConv2dParams& p, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const DepthwiseConv2dParams& d = p.depthwise;
  const bool has_clusters = device.major >= 9 && !portable_only();
  if (!has_clusters || !is_half(d.dtype)) return false;
  if (d.multiplier != 1 || d.channels % 8 != 0) return false;
  if (d.input_activation > Activation::kRelu6 || d.activation > Activation::kRelu6) return false;
  if (p.outputs <= 0 || p.outputs % 8 != 0) return false;
  if (d.kernel_h != d.kernel_w || (d.kernel_h != 3 && d.kernel_h != 5)) return false;
  if (d.stride_h != d.stride_w || d.stride_h > 2 || d.is_dilated()) return false;
  if (d.padding_h >= d.kernel_h || d.padding_w >= d.kernel_w) return false;
  const auto places =
      reinterpret_cast<uintptr_t>(d.input) | reinterpret_cast<uintptr_t>(d.weight) |
      reinterpret_cast<uintptr_t>(d.bias) | reinterpret_cast<uintptr_t>(d.input_bias) |
      reinterpret_cast<uintptr_t>(p.point_weight) | reinterpret_cast<uintptr_t>(p.residual);
  if (places % kVectorBytes != 0) return false;
  // Offsets have 31 bits; with what lies outside the image.
  const int64_t rows = d.batch * (d.in_h + 2 * d.kernel_h), columns = d.in_w + 2 * d.kernel_w;
  if (rows > kMost / columns / d.channels) return false;
  if (d.batch > kMost / d.out_h / (d.out_w + 1) / p.outputs) return false;
  if (p.outputs > kMost / d.channels) return false;
  const separable::Cut cut = separable::cut_of(p);
  return cut.tiles * cut.slices <= kMost && cut.padded() <= separable::kMostChannels &&
         cut.bytes(p.outputs, d.kernel_h * d.kernel_w) <= device.shared_per_block;
}

cudaError_t launch_separable_conv2d(const SeparableConv2dParams& p, const Device& device,
                                    cudaStream_t stream) {
  return visit_half_type(p.depthwise.dtype, [&]<typename T>() {
    return separable::launch_typed<T>(p, device, stream);
  });
}

}  // namespace dwswap
