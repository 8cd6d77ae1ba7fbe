// The CUDA kernels of torch.ops.dwswap.depthwise_conv2d: check, describe, allocate, choose, launch.
// Schema: dwswap/schema.py. Other devices and autograd: dwswap/registration.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "depthwise_conv2d/arguments.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace {

struct Options {
  Geometry geometry;
  Activation input_activation, activation;
};

Options parse_options(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, const std::string& input_activation,
                      const std::string& activation) {
  return {parse_geometry(stride, padding, dilation),
          parse_activation(kOperator, "input_activation", input_activation),
          parse_activation(kOperator, "activation", activation)};
}

Tensor call_aten(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Options& options, const std::optional<Tensor>& input_bias) {
  using torch::stable::detail::from;
  const auto pair = [](const Pair& p) { return from(std::vector<int64_t>{p.h, p.w}); };
  const auto name = [](Activation a) {
    return from(std::string(kActivationNames[static_cast<size_t>(a)]));
  };
  std::array<StableIValue, 9> stack{from(input),
                                    from(weight),
                                    from(bias),
                                    pair(options.geometry.stride),
                                    pair(options.geometry.padding),
                                    pair(options.geometry.dilation),
                                    from(input_bias),
                                    name(options.input_activation),
                                    name(options.activation)};
  DWSWAP_CHECK(torch_call_dispatcher("dwswap::_depthwise_conv2d_aten", "", stack.data(),
                                     TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
               "aten::conv2d, which computes what has no kernel here (other dtypes than float32, "
               "float16, bfloat16 and float64; GPUs before sm_80), failed for dtype ",
               torch::headeronly::toString(input.scalar_type()),
               "; a process without Python does not have it");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Arguments that were checked, as kernels get them but for the output.
struct Problem {
  DepthwiseConv2dParams params;
  Tensor weight;  // dense; params point into these
  std::optional<Tensor> bias, input_bias;
};

// Nothing where aten has to compute: for other dtypes, and on GPUs that the library has no code
// for. The device of the input is the current one.
std::optional<Problem> describe(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Options& options,
                                const std::optional<Tensor>& input_bias) {
  DepthwiseConv2dParams p = checked_sizes(input, weight, options.geometry);
  p.input_activation = options.input_activation, p.activation = options.activation;
  const auto bias_vector = checked_vector(kOperator, "bias", bias, p.out_channels(), input);
  const auto input_bias_vector =
      checked_vector(kOperator, "input_bias", input_bias, p.channels, input);

  const auto dtype = kernel_data_type(input);
  if (!dtype.has_value()) return std::nullopt;
  const Image in(input);
  p.dtype = *dtype;
  p.in_stride = in.stride;
  p.out_layout = output_layout(in, weight, p.dtype);
  p.out_stride = dense_strides(p.out_channels(), p.out_h, p.out_w, p.out_layout);
  // An image with one channel or one pixel has both layouts: take the output's.
  const bool matches = p.out_layout == Layout::kChannelsLast ? in.channels_last() : in.contiguous();
  p.in_layout = matches              ? p.out_layout
                : in.contiguous()    ? Layout::kContiguous
                : in.channels_last() ? Layout::kChannelsLast
                                     : Layout::kStrided;

  Problem problem{p, dense(weight), bias_vector, input_bias_vector};
  problem.params.input = input.const_data_ptr();
  problem.params.weight = problem.weight.const_data_ptr();
  problem.params.bias = bias_vector ? bias_vector->const_data_ptr() : nullptr;
  problem.params.input_bias = input_bias_vector ? input_bias_vector->const_data_ptr() : nullptr;
  return problem;
}

Tensor run(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
           const Options& options, const std::optional<Tensor>& input_bias) {
  check_cuda(kOperator, input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto problem = describe(input, weight, bias, options, input_bias);
  if (!problem) return call_aten(input, weight, bias, options, input_bias);
  DepthwiseConv2dParams& p = problem->params;
  const Tensor output = allocate_image(kOperator, "output", p.batch, p.out_channels(), p.out_h,
                                       p.out_w, p.out_stride, input);
  if (p.batch == 0) return output;
  p.output = output.mutable_data_ptr();

  const Choice choice = choose_forward(p);
  check_launch(kOperator, choice.launch(p, current_stream(kOperator, device)), choice.family);
  return output;
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        const std::optional<Tensor>& input_bias,
                        const std::string& input_activation, const std::string& activation) {
  return run(input, weight, bias,
             parse_options(stride, padding, dilation, input_activation, activation), input_bias);
}

// The same for callers whose microseconds count: lists and strings cost one more allocation each,
// on either side of the stable ABI. `activations` is the index of the activation of the input,
// times 16, and that of the output.
Tensor depthwise_conv2d_direct(const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias, int64_t stride_h,
                               int64_t stride_w, int64_t padding_h, int64_t padding_w,
                               int64_t dilation_h, int64_t dilation_w,
                               const std::optional<Tensor>& input_bias, int64_t activations) {
  const auto [before, after] = parse_activations(kOperator, activations);
  const Options options{
      {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}}, before, after};
  return run(input, weight, bias, options, input_bias);
}

// The name of the family of kernels that would run, or "aten".
std::string depthwise_conv2d_family(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& input_bias,
    const std::string& input_activation, const std::string& activation) {
  check_cuda(kOperator, input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Options options = parse_options(stride, padding, dilation, input_activation, activation);
  const auto problem = describe(input, weight, bias, options, input_bias);
  return problem ? choose_forward(problem->params).family : "aten";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("_depthwise_conv2d_direct", TORCH_BOX(&depthwise_conv2d_direct));
  m.impl("_depthwise_conv2d_family", TORCH_BOX(&depthwise_conv2d_family));
}

}  // namespace dwswap
