// The CUDA kernel of torch.ops.dwswap._stem_conv2d: check, describe, allocate, launch.
// Schema: dwswap/schema.py. Everything else: dwswap/stems.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/device.h"
#include "common/tensor.h"
#include "stem_conv2d/params.h"

namespace dwswap {
namespace {

constexpr const char* kOperator = "dwswap._stem_conv2d";

// Whether there are a kernel and tensors as it takes them.
bool describe(StemConv2dParams& p, const Tensor& input, const Tensor& weight) {
  const auto dtype = kernel_data_type(input);
  if (!dtype.has_value() || weight.dim() != 4 || (input.dim() != 3 && input.dim() != 4))
    return false;
  const Image image(input), taps(weight);
  if (image.c != 3 || taps.c != 3 || taps.h != 3 || taps.w != 3) return false;
  const bool channels_last = !image.contiguous();
  if (channels_last && !image.channels_last()) return false;
  if (!taps.contiguous() && !taps.channels_last()) return false;
  p.batch = image.n, p.height = image.h, p.width = image.w, p.channels = taps.n;
  p.weight_plane = taps.stride.c, p.weight_row = taps.stride.h, p.weight_column = taps.stride.w;
  p.dtype = *dtype;
  p.layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  return covers_stem_conv2d(p);
}

// `activations`: the index of that behind the bias, as the second of two.
Tensor stem_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   int64_t activations) {
  check_cuda(kOperator, input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  StemConv2dParams p{};
  if (!describe(p, input, weight))
    return call_instead(kOperator, "dwswap::_stem_conv2d_aten", "aten", input, weight, bias,
                        activations);
  p.activation = parse_activations(kOperator, activations).second;
  check_same(kOperator, "weight", weight, input);
  const std::optional<Tensor> added = checked_vector(kOperator, "bias", bias, p.channels, input);

  const Strides strides = dense_strides(p.channels, p.out_h(), p.out_w(), Layout::kChannelsLast);
  const Tensor output = allocate_image(kOperator, "output", p.batch, p.channels, p.out_h(),
                                       p.out_w(), strides, input);
  if (p.batch == 0) return output;
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.output = output.mutable_data_ptr();
  if (added.has_value()) p.bias = added->const_data_ptr();
  const cudaStream_t stream = current_stream(kOperator, device);
  check_launch(kOperator, launch_stem_conv2d(p, current_device(), stream), "stem");
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) { m.impl("_stem_conv2d", TORCH_BOX(&stem_conv2d)); }

}  // namespace dwswap
