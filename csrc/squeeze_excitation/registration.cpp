// The CUDA kernels of torch.ops.dwswap.squeeze_excitation: check, describe, allocate, launch. With
// many samples the layers are calls of aten::linear.
// Schema: dwswap/schema.py. Other devices and autograd: dwswap/excitation_registration.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>

#include "common/device.h"
#include "common/tensor.h"
#include "squeeze_excitation/params.h"

namespace dwswap {
namespace {

constexpr const char* kOperator = "dwswap.squeeze_excitation";

// The matrix of a linear layer, or of a 1 x 1 convolution.
Tensor checked_matrix(const char* name, const Tensor& tensor, const Tensor& input) {
  const bool matrix =
      tensor.dim() == 2 || (tensor.dim() == 4 && tensor.size(2) == 1 && tensor.size(3) == 1);
  DWSWAP_CHECK_IN(kOperator, matrix && tensor.size(0) > 0 && tensor.size(1) > 0, name,
                  " must be (K, C) or (K, C, 1, 1) with K and C of at least 1, got shape ",
                  shape_string(tensor));
  check_same(kOperator, name, tensor, input);
  return dense(tensor);
}

struct Arguments {
  const Tensor& input;
  const Tensor& reduce_weight;
  const std::optional<Tensor>& reduce_bias;
  const Tensor& expand_weight;
  const std::optional<Tensor>& expand_bias;
  const std::string& activation;
  const std::string& gate;
};

Tensor call_aten(const Arguments& a) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{
      from(a.input),       from(a.reduce_weight), from(a.reduce_bias), from(a.expand_weight),
      from(a.expand_bias), from(a.activation),    from(a.gate)};
  DWSWAP_CHECK_IN(kOperator,
                  torch_call_dispatcher("dwswap::_squeeze_excitation_aten", "", stack.data(),
                                        TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "aten, which computes what has no kernel here, failed for dtype ",
                  torch::headeronly::toString(a.input.scalar_type()),
                  "; a process without Python does not have it");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// `rows` by the transposed weight, plus bias.
Tensor linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(rows), from(torch::stable::flatten(weight, 1, -1)),
                                    from(bias)};
  DWSWAP_CHECK_IN(kOperator,
                  torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) ==
                      AOTI_TORCH_SUCCESS,
                  "aten::linear, which multiplies ", shape_string(rows), " by the weight of ",
                  shape_string(weight), ", failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The layers of a block, dense.
struct Layers {
  Tensor reduce_weight;
  std::optional<Tensor> reduce_bias;
  Tensor expand_weight;
  std::optional<Tensor> expand_bias;
};

void run_products(const SqueezeExcitationParams& p, const Layers& layers, const Tensor& input,
                  cudaStream_t stream) {
  const int64_t sizes[2] = {p.batch, p.channels}, strides[2] = {p.channels, 1};
  const Tensor means =
      allocate(kOperator, "buffer of means", sizes, strides, 2, input, dtype_of(kOperator, input));
  check_launch(kOperator, launch_means(p, means.mutable_data_ptr(), stream), "mean");
  const Tensor hidden = linear(means, layers.reduce_weight, layers.reduce_bias);
  check_launch(kOperator, launch_activation(p, hidden.mutable_data_ptr(), stream), "activate");
  const Tensor gate_inputs = linear(hidden, layers.expand_weight, layers.expand_bias);
  check_launch(kOperator, launch_scaling(p, gate_inputs.const_data_ptr(), stream), "scale");
}

Tensor run(const Arguments& a) {
  check_cuda(kOperator, a.input);
  const int32_t device = a.input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  DWSWAP_CHECK_IN(kOperator, a.input.dim() == 3 || a.input.dim() == 4,
                  "input must be 4-D (N, C, H, W) or 3-D (C, H, W), got shape ",
                  shape_string(a.input));
  const Image image(a.input);
  DWSWAP_CHECK_IN(kOperator, image.c > 0 && image.h > 0 && image.w > 0,
                  "input must have C, H and W of at least 1, got shape ", shape_string(a.input));
  Layers layers{checked_matrix("reduce_weight", a.reduce_weight, a.input), std::nullopt,
                checked_matrix("expand_weight", a.expand_weight, a.input), std::nullopt};
  const Tensor &reduce_weight = layers.reduce_weight, &expand_weight = layers.expand_weight;
  const int64_t hidden = reduce_weight.size(0);
  DWSWAP_CHECK_IN(kOperator, reduce_weight.size(1) == image.c,
                  "reduce_weight.shape[1] must be the input's ", image.c, " channels, got ",
                  reduce_weight.size(1));
  DWSWAP_CHECK_IN(kOperator, expand_weight.size(0) == image.c && expand_weight.size(1) == hidden,
                  "expand_weight must be (", image.c, ", ", hidden, "), got shape ",
                  shape_string(a.expand_weight));
  layers.reduce_bias = checked_vector(kOperator, "reduce_bias", a.reduce_bias, hidden, a.input);
  layers.expand_bias = checked_vector(kOperator, "expand_bias", a.expand_bias, image.c, a.input);

  SqueezeExcitationParams p{};
  p.activation = parse_activation(kOperator, "activation", a.activation);
  p.gate = parse_activation(kOperator, "gate", a.gate);
  const auto dtype = kernel_data_type(a.input);
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool countable =
      image.c <= kMost && image.h <= kMost && image.h * image.w <= kMost && hidden <= kMostHidden;
  if (!dtype || !countable) return call_aten(a);
  p.dtype = *dtype;
  p.batch = static_cast<int32_t>(image.n), p.channels = static_cast<int32_t>(image.c);
  p.pixels = static_cast<int32_t>(image.h * image.w), p.hidden = static_cast<int32_t>(hidden);
  // The rule of dwswap/layouts.py.
  p.layout = suggests_channels_last(image) ? Layout::kChannelsLast : Layout::kContiguous;
  const bool channels_last = p.layout == Layout::kChannelsLast;
  const bool is_dense = channels_last ? image.channels_last() : image.contiguous();
  const bool covered = covers_squeeze_excitation(p);
  if (!covered || (!is_dense && channels_last && a.input.dim() == 3)) return call_aten(a);

  using torch::headeronly::MemoryFormat;
  const Tensor input =
      is_dense ? a.input
               : torch::stable::contiguous(a.input, channels_last ? MemoryFormat::ChannelsLast
                                                                  : MemoryFormat::Contiguous);
  const Tensor output = allocate_image(kOperator, "output", image.n, image.c, image.h, image.w,
                                       dense_strides(image.c, image.h, image.w, p.layout), a.input);
  if (p.batch == 0) return output;
  p.input = input.const_data_ptr(), p.output = output.mutable_data_ptr();
  const cudaStream_t stream = current_stream(kOperator, device);
  const int multiprocessors = current_device().multiprocessors;
  if (prefers_products(p, multiprocessors)) {
    run_products(p, layers, input, stream);
    return output;
  }
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
  };
  p.reduce_weight = reduce_weight.const_data_ptr(), p.reduce_bias = data(layers.reduce_bias);
  p.expand_weight = expand_weight.const_data_ptr(), p.expand_bias = data(layers.expand_bias);

  const ExcitationCut cut = cut_squeeze_excitation(p, multiprocessors);
  const int64_t count = int64_t{p.batch} * cut.parts() * p.hidden, one = 1;
  const Tensor partials = allocate(kOperator, "buffer of partial sums", &count, &one, 1, a.input,
                                   aoti_torch_dtype_float32());
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  check_launch(kOperator, launch_squeeze_excitation(p, cut, stream), "squeeze_excitation");
  return output;
}

Tensor squeeze_excitation(const Tensor& input, const Tensor& reduce_weight,
                          const std::optional<Tensor>& reduce_bias, const Tensor& expand_weight,
                          const std::optional<Tensor>& expand_bias, const std::string& activation,
                          const std::string& gate) {
  return run({input, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("squeeze_excitation", TORCH_BOX(&squeeze_excitation));
}

}  // namespace dwswap
