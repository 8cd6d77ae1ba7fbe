// The CUDA kernels of torch.ops.dwswap._depthwise_conv2d_backward: check, describe, allocate,
// choose, launch. Schema: dwswap/schema.py. Other devices and autograd: dwswap/backward.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "depthwise_conv2d/arguments.h"
#include "depthwise_conv2d/backward/params.h"

namespace dwswap {
namespace {

using Mask = std::array<bool, 3>;                      // of the gradients of input, weight and bias
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // what is not wanted is undefined

Mask parse_mask(const std::vector<bool>& wanted) {
  DWSWAP_CHECK(wanted.size() == 3, "output_mask must have 3 elements, got ", wanted.size());
  return {wanted[0], wanted[1], wanted[2]};
}

// `tensor` in `layout`, without gaps.
Tensor laid_out(const Tensor& tensor, const Image& image, Layout layout) {
  using torch::headeronly::MemoryFormat;
  if (layout == Layout::kContiguous)
    return image.contiguous() ? tensor : torch::stable::contiguous(tensor);
  if (image.channels_last()) return tensor;
  const bool batched = tensor.dim() == 4;
  const Tensor images = batched ? tensor : torch::stable::unsqueeze(tensor, 0);
  const Tensor dense = torch::stable::contiguous(images, MemoryFormat::ChannelsLast);
  return batched ? dense : torch::stable::squeeze(dense, 0);
}

// Arguments that were checked, as kernels get them but for the gradients and the workspace.
struct Problem {
  GradientParams params;
  Tensor grad_output, input, weight;  // params point into these
  Image weight_image;
};

// Nothing where aten has to compute. The device of the input is the current one.
std::optional<Problem> describe(const Tensor& grad_output, const Tensor& input,
                                const Tensor& weight, const Geometry& geometry,
                                const Mask& output_mask) {
  GradientParams p{};
  static_cast<DepthwiseConv2dParams&>(p) = checked_sizes(input, weight, geometry);
  std::vector<int64_t> expected{p.batch, p.out_channels(), p.out_h, p.out_w};
  if (input.dim() == 3) expected.erase(expected.begin());
  const auto sizes = grad_output.sizes();
  DWSWAP_CHECK(expected == std::vector<int64_t>(sizes.begin(), sizes.end()),
               "grad_output must have the output's shape ", shape_string(expected), ", got ",
               shape_string(grad_output));
  check_same(kOperator, "grad_output", grad_output, input);

  const auto dtype = kernel_data_type(input);
  if (!dtype.has_value()) return std::nullopt;
  const Image in(input);
  p.dtype = *dtype;
  p.in_layout = p.out_layout = output_layout(in, weight, p.dtype);
  p.in_stride = dense_strides(p.channels, p.in_h, p.in_w, p.in_layout);
  p.out_stride = dense_strides(p.out_channels(), p.out_h, p.out_w, p.out_layout);
  p.wants_weight = output_mask[1], p.wants_bias = output_mask[2];
  Problem problem{p, laid_out(grad_output, Image(grad_output), p.out_layout),
                  p.wants_weight ? laid_out(input, in, p.in_layout) : input,
                  output_mask[0] ? dense(weight) : weight, Image(weight)};
  problem.params.grad_output = problem.grad_output.const_data_ptr();
  problem.params.input = problem.input.const_data_ptr();
  problem.params.weight = problem.weight.const_data_ptr();
  return problem;
}

Tensor allocate_grad_weight(const Problem& problem) {
  const GradientParams& p = problem.params;
  const Layout layout =
      suggests_channels_last(problem.weight_image) ? Layout::kChannelsLast : Layout::kContiguous;
  // One channel per group: in either layout a channel's taps follow each other.
  const Strides stride = dense_strides(1, p.kernel_h, p.kernel_w, layout);
  return allocate_image(kOperator, "gradient of the weight", p.out_channels(), 1, p.kernel_h,
                        p.kernel_w, stride, problem.weight);
}

Tensor allocate_vector(const char* what, int64_t length, const Tensor& like, int32_t dtype) {
  constexpr int64_t kStride = 1;
  return allocate(kOperator, what, &length, &kStride, 1, like, dtype);
}

void run(const GradientChoice& choice, GradientParams& p, const Tensor& input,
         cudaStream_t stream) {
  const int64_t bytes = choice.workspace_bytes(p);
  std::optional<Tensor> workspace;
  if (bytes != 0) {
    workspace =
        allocate_vector("workspace of the gradients", bytes, input, aoti_torch_dtype_uint8());
    p.workspace = workspace->mutable_data_ptr();
  }
  check_launch(kOperator, choice.launch(p, stream), choice.family);
}

Gradients call_aten(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                    const Geometry& geometry, const Mask& output_mask) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const auto pair = [](const Pair& p) { return from(std::vector<int64_t>{p.h, p.w}); };
  std::array<StableIValue, 7> stack{
      from(grad_output),
      from(input),
      from(weight),
      pair(geometry.stride),
      pair(geometry.padding),
      pair(geometry.dilation),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(output_mask.data(), output_mask.size()))};
  DWSWAP_CHECK(torch_call_dispatcher("dwswap::_depthwise_conv2d_backward_aten", "", stack.data(),
                                     TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
               "aten::convolution_backward, which computes what has no kernel here, failed for "
               "dtype ",
               torch::headeronly::toString(input.scalar_type()));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

Gradients depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                    const Tensor& weight, const std::vector<int64_t>& stride,
                                    const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& dilation,
                                    const std::vector<bool>& wanted) {
  check_cuda(kOperator, input);
  const Mask output_mask = parse_mask(wanted);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Geometry geometry = parse_geometry(stride, padding, dilation);
  auto problem = describe(grad_output, input, weight, geometry, output_mask);
  if (!problem) return call_aten(grad_output, input, weight, geometry, output_mask);
  GradientParams& p = problem->params;

  Gradients gradients;
  auto& [grad_input, grad_weight, grad_bias] = gradients;
  if (output_mask[0]) {
    grad_input = allocate_image(kOperator, "gradient of the input", p.batch, p.channels, p.in_h,
                                p.in_w, p.in_stride, input);
    p.grad_input = grad_input.mutable_data_ptr();
  }
  if (output_mask[1]) {
    grad_weight = allocate_grad_weight(*problem);
    p.grad_weight = grad_weight.mutable_data_ptr();
  }
  if (output_mask[2]) {
    grad_bias = allocate_vector("gradient of the bias", p.out_channels(), input,
                                dtype_of(kOperator, input));
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (p.batch == 0) {
    if (output_mask[1]) torch::stable::zero_(grad_weight);
    if (output_mask[2]) torch::stable::zero_(grad_bias);
    return gradients;
  }
  const cudaStream_t stream = current_stream(kOperator, device);
  if (output_mask[0]) run(choose_input_gradient(p), p, input, stream);
  if (output_mask[1] || output_mask[2]) run(choose_weight_gradient(p), p, input, stream);
  return gradients;
}

// The families of kernels that would run, or "aten": of the gradient of the input, and behind a
// comma that of weight and bias; empty where it is not wanted.
std::string depthwise_conv2d_backward_family(const Tensor& grad_output, const Tensor& input,
                                             const Tensor& weight,
                                             const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation,
                                             const std::vector<bool>& wanted) {
  check_cuda(kOperator, input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Geometry geometry = parse_geometry(stride, padding, dilation);
  const Mask output_mask = parse_mask(wanted);
  const auto problem = describe(grad_output, input, weight, geometry, output_mask);
  const auto name = [&](bool wanted, auto choose) -> std::string {
    if (!wanted) return "";
    return problem ? choose(problem->params).family : "aten";
  };
  return name(output_mask[0], choose_input_gradient) + "," +
         name(output_mask[1] || output_mask[2], choose_weight_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("_depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  m.impl("_depthwise_conv2d_backward_family", TORCH_BOX(&depthwise_conv2d_backward_family));
}

}  // namespace dwswap
