// The CUDA kernel of torch.ops.dwswap._separable_conv2d: check, describe, allocate, launch.
// Schema: dwswap/schema.py. Everything else: dwswap/separable.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "depthwise_conv2d/arguments.h"
#include "separable_conv2d/cut.h"
#include "separable_conv2d/params.h"

namespace dwswap {
namespace {

constexpr const char* kSeparable = "dwswap._separable_conv2d";

// Whether `tensor` is (N, outputs, H, W) as the kernel writes it.
bool is_result(const Tensor& tensor, const SeparableConv2dParams& p) {
  const DepthwiseConv2dParams& d = p.depthwise;
  if (tensor.dim() != 4) return false;
  const Image image(tensor);
  return image.n == d.batch && image.c == p.outputs && image.h == d.out_h && image.w == d.out_w &&
         image.channels_last();
}

// `activations`: the index of that in front of the depthwise convolution, times 16, and that of the
// one behind it. `pixels`, `slices`: how the problem is cut, of blocks and their clusters.
Tensor separable_conv2d(const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& input_bias,
                        int64_t stride, int64_t padding, int64_t activations,
                        const Tensor& point_weight, const std::optional<Tensor>& point_bias,
                        const std::optional<Tensor>& residual, int64_t pixels, int64_t slices) {
  check_cuda(kSeparable, input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  DWSWAP_CHECK_IN(kSeparable, pixels == 8 || pixels == 16 || pixels == 32,
                  "pixels must be 8, 16 or 32, got ", pixels);
  DWSWAP_CHECK_IN(kSeparable, slices >= 1 && slices <= separable::kMostSlices,
                  "slices must be 1 to ", separable::kMostSlices, ", got ", slices);
  const Geometry geometry{{stride, stride}, {padding, padding}, {1, 1}};
  SeparableConv2dParams p{};
  DepthwiseConv2dParams& d = p.depthwise;
  d = checked_sizes(input, weight, geometry);
  std::tie(d.input_activation, d.activation) = parse_activations(kSeparable, activations);
  p.pixels = static_cast<int32_t>(pixels), p.slices = static_cast<int32_t>(slices);
  p.outputs = point_weight.dim() > 0 ? point_weight.size(0) : 0;
  DWSWAP_CHECK_IN(kSeparable,
                  point_weight.dim() == 4 && point_weight.size(1) == d.out_channels() &&
                      point_weight.size(2) == 1 && point_weight.size(3) == 1,
                  "point_weight must be (K, ", d.out_channels(), ", 1, 1), got shape ",
                  shape_string(point_weight));
  check_same(kSeparable, "point_weight", point_weight, input);
  const auto vector = [&](const char* name, const std::optional<Tensor>& given, int64_t length) {
    return checked_vector(kSeparable, name, given, length, input);
  };
  const std::optional<Tensor> added = vector("bias", bias, d.out_channels());
  const std::optional<Tensor> before = vector("input_bias", input_bias, d.channels);
  const std::optional<Tensor> behind = vector("point_bias", point_bias, p.outputs);
  if (residual.has_value()) check_same(kSeparable, "residual", *residual, input);
  const Tensor taps = dense(weight), points = dense(point_weight);

  const auto dtype = kernel_data_type(input);
  bool is_covered = dtype.has_value() && input.dim() == 4 && Image(input).channels_last() &&
                    (!residual.has_value() || is_result(*residual, p));
  if (is_covered) {
    d.dtype = *dtype;
    d.input = input.const_data_ptr(), d.weight = taps.const_data_ptr();
    p.point_weight = points.const_data_ptr();
    if (added.has_value()) d.bias = added->const_data_ptr();
    if (before.has_value()) d.input_bias = before->const_data_ptr();
    if (behind.has_value()) p.point_bias = behind->const_data_ptr();
    if (residual.has_value()) p.residual = residual->const_data_ptr();
    is_covered = covers_separable_conv2d(p, current_device());
  }
  if (!is_covered)
    return call_instead(kSeparable, "dwswap::_separable_conv2d_apart", "two convolutions", input,
                        weight, bias, input_bias, stride, padding, activations, point_weight,
                        point_bias, residual, pixels, slices);

  const Strides strides = dense_strides(p.outputs, d.out_h, d.out_w, Layout::kChannelsLast);
  const Tensor output =
      allocate_image(kSeparable, "output", d.batch, p.outputs, d.out_h, d.out_w, strides, input);
  if (d.batch == 0) return output;
  p.output = output.mutable_data_ptr();
  const cudaStream_t stream = current_stream(kSeparable, device);
  check_launch(kSeparable, launch_separable_conv2d(p, current_device(), stream), "separable");
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("_separable_conv2d", TORCH_BOX(&separable_conv2d));
}

}  // namespace dwswap
