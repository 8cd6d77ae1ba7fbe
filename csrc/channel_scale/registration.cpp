// The CUDA kernels of torch.ops.dwswap._channel_scale and _channel_scale_backward: check, describe,
// allocate, launch. Schema: dwswap/schema.py. Who calls them, and when: dwswap/channel_scale.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "channel_scale/launch.h"
#include "common/tensor.h"

namespace dwswap {
namespace {

constexpr const char* kScale = "dwswap._channel_scale";
constexpr const char* kBackward = "dwswap._channel_scale_backward";

// (N, C) or (N, C, 1, 1) of an image, its elements in this order.
void check_planes(const char* op, const char* name, const Tensor& tensor, const Image& image,
                  const Tensor& input) {
  const auto sizes = tensor.sizes();
  const bool planes =
      (sizes.size() == 2 || (sizes.size() == 4 && sizes[2] == 1 && sizes[3] == 1)) &&
      sizes[0] == image.n && sizes[1] == image.c;
  DWSWAP_CHECK_IN(op, planes, name, " must be (", image.n, ", ", image.c, ") or (", image.n, ", ",
                  image.c, ", 1, 1), got shape ", shape_string(tensor));
  DWSWAP_CHECK_IN(
      op, (image.n == 1 || tensor.stride(0) == image.c) && (image.c == 1 || tensor.stride(1) == 1),
      name, " must be dense, got strides ", shape_string(tensor.strides()));
  check_device(op, name, tensor, input);
}

// The image, the gates, and what they are.
ChannelScaleParams describe(const char* op, const Tensor& input, const Tensor& gates,
                            int64_t activation) {
  const DenseImage image = checked_image(op, input);
  ChannelScaleParams p{};
  p.dtype = image.dtype, p.layout = image.layout;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool countable =
      std::max({image.n, image.c, image.h, image.w}) <= kMost && image.h * image.w <= kMost;
  if (countable) {
    p.batch = static_cast<int32_t>(image.n), p.channels = static_cast<int32_t>(image.c);
    p.pixels = static_cast<int32_t>(image.h * image.w);
  }
  DWSWAP_CHECK_IN(op, countable && covers_channel_scale(p),
                  "input must have 1 to 2^30 planes of 1 to 2^30 pixels, got shape ",
                  shape_string(input));
  check_planes(op, "gates", gates, image, input);
  const auto gate_type = data_type(gates.scalar_type());
  DWSWAP_CHECK_IN(op,
                  gate_type.has_value() && *gate_type != DataType::kFloat64 &&
                      (*gate_type == p.dtype || p.dtype == DataType::kFloat32),
                  "gates must have the input's dtype, or float16 or bfloat16 for float32, got ",
                  torch::headeronly::toString(gates.scalar_type()));
  p.gate_type = *gate_type;
  const auto [before, gate] = parse_activations(op, activation);
  DWSWAP_CHECK_IN(
      op,
      before == Activation::kNone && (gate == Activation::kNone || gate == Activation::kSigmoid ||
                                      gate == Activation::kHardsigmoid),
      "activation must be none, sigmoid or hardsigmoid, got index ", activation);
  p.activation = gate;
  p.input = input.const_data_ptr(), p.gates = gates.const_data_ptr();
  return p;
}

Tensor scale(const Tensor& input, const Tensor& gates, const std::optional<Tensor>& spread,
             int64_t activation) {
  ChannelScaleParams p = describe(kScale, input, gates, activation);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (spread.has_value()) {
    check_planes(kScale, "spread", *spread, Image(input), input);
    check_same(kScale, "spread", *spread, input);
    p.spread = spread->const_data_ptr();
  }
  const Tensor output = allocate_like(kScale, "output", input);
  p.output = output.mutable_data_ptr();
  check_launch(kScale, launch_channel_scale(p, current_stream(kScale, device)), "channel scale");
  return output;
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& gates,
                int64_t activation) {
  ChannelScaleParams p = describe(kBackward, input, gates, activation);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_same(kBackward, "grad_output", grad_output, input);
  const auto sizes = grad_output.sizes(), wanted = input.sizes();
  DWSWAP_CHECK_IN(kBackward, std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()),
                  "grad_output must have the input's shape ", shape_string(input), ", got ",
                  shape_string(grad_output));
  const Image gradient(grad_output);
  DWSWAP_CHECK_IN(
      kBackward,
      p.layout == Layout::kChannelsLast ? gradient.channels_last() : gradient.contiguous(),
      "grad_output must be laid out as the input, got strides ",
      shape_string(grad_output.strides()));
  p.output_gradient = grad_output.const_data_ptr();
  const Tensor grad_gates = allocate_like(kBackward, "gradient of the gates", gates);
  p.gate_gradients = grad_gates.mutable_data_ptr();
  const channel_scale::Cut cut = channel_scale::sums_cut(p, current_device().multiprocessors);
  std::optional<Tensor> partials;
  if (cut.splits > 1) {
    const int64_t planes = int64_t{p.batch} * p.channels;
    const int64_t count[2] = {cut.splits, planes}, strides[2] = {planes, 1};
    partials = allocate(kBackward, "sums", count, strides, 2, input, aoti_torch_dtype_float32());
    p.partials = static_cast<float*>(partials->mutable_data_ptr());
  }
  check_launch(kBackward, launch_gate_gradients(p, cut, current_stream(kBackward, device)),
               "channel scale");
  return grad_gates;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("_channel_scale", TORCH_BOX(&scale));
  m.impl("_channel_scale_backward", TORCH_BOX(&backward));
}

}  // namespace dwswap
