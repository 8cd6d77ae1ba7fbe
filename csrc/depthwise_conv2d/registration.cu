// The CUDA kernels of torch.ops.dwswap.depthwise_conv2d: check, describe, allocate, choose, launch.
// Schema: dwswap/schema.py. Other devices and autograd: dwswap/registration.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/device.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kMostElements = 0x1p60;  // their bytes still fit 63 bits

constexpr std::array<const char*, 9> kActivationNames = {
    "none", "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "hardsigmoid", "sigmoid"};

Activation parse_activation(const char* argument, const std::string& name) {
  for (size_t i = 0; i < kActivationNames.size(); ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  std::string known;
  for (const char* entry : kActivationNames)
    known += (known.empty() ? "" : ", ") + std::string(entry);
  DWSWAP_CHECK(false, argument, " must be one of ", known, ", got '", name, "'");
}

std::optional<DataType> data_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::Half:
      return DataType::kFloat16;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Double:
      return DataType::kFloat64;
    default:
      return std::nullopt;
  }
}

struct Pair {
  int64_t h, w;
};

Pair parse_pair(const char* argument, const std::vector<int64_t>& values) {
  DWSWAP_CHECK(values.size() == 1 || values.size() == 2, argument,
               " must be a pair of ints (height, width), got ", shape_string(values));
  return {values.front(), values.back()};
}

void check_pair(const char* argument, const Pair& pair, int64_t minimum) {
  DWSWAP_CHECK(pair.h >= minimum && pair.w >= minimum, argument, " must be at least ", minimum,
               ", got ", shape_string(std::array{pair.h, pair.w}));
}

struct Options {
  Pair stride, padding, dilation;
  Activation input_activation, activation;
};

Options parse_options(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, const std::string& input_activation,
                      const std::string& activation) {
  return {parse_pair("stride", stride), parse_pair("padding", padding),
          parse_pair("dilation", dilation), parse_activation("input_activation", input_activation),
          parse_activation("activation", activation)};
}

// Sizes and strides as (N, C, H, W); without N as Tensor::unsqueeze(0) has them.
struct Image {
  int64_t n, c, h, w;
  Strides stride;

  explicit Image(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    const size_t d = sizes.size() - 3;
    n = d == 1 ? sizes[0] : 1;
    c = sizes[d], h = sizes[d + 1], w = sizes[d + 2];
    stride = {d == 1 ? strides[0] : sizes[d] * strides[d], strides[d], strides[d + 1],
              strides[d + 2]};
  }

  // Strides of dimensions of size 1 are free.
  bool has_strides(int64_t sn, int64_t sc, int64_t sh, int64_t sw) const {
    return (n == 1 || stride.n == sn) && (c == 1 || stride.c == sc) && (h == 1 || stride.h == sh) &&
           (w == 1 || stride.w == sw);
  }
  bool contiguous() const { return has_strides(c * h * w, h * w, w, 1); }
  bool channels_last() const { return has_strides(h * w * c, 1, w * c, c); }
};

// Tensor::suggest_memory_format() == ChannelsLast of c10/core/MemoryFormat.h.
bool suggests_channels_last(const Image& image) {
  const int64_t sizes[4] = {image.n, image.c, image.h, image.w};
  const int64_t strides[4] = {image.stride.n, image.stride.c, image.stride.h, image.stride.w};
  if (strides[1] == 0) return false;
  int64_t minimum = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < minimum) return false;
    if (d == 0 && minimum == strides[1]) return false;
    minimum = strides[d] * sizes[d];
  }
  return true;
}

void check_cuda(const Tensor& input) {
  DWSWAP_CHECK(input.is_cuda(),
               "input must be on the device of the other tensors, got a tensor on ",
               input.is_cpu() ? "the CPU" : "another kind of device");
}

// Asked first: a call of aten's contiguous costs microseconds.
Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

void check_same(const char* name, const Tensor& tensor, const Tensor& input) {
  DWSWAP_CHECK(tensor.is_cuda() && tensor.get_device_index() == input.get_device_index(), name,
               " must be on the input's device, cuda:", input.get_device_index(), ", got ",
               tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                                : std::string(tensor.is_cpu() ? "cpu" : "another kind of device"));
  DWSWAP_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the input's dtype ",
               torch::headeronly::toString(input.scalar_type()), ", got ",
               torch::headeronly::toString(tensor.scalar_type()));
}

std::optional<Tensor> checked_vector(const char* name, const std::optional<Tensor>& tensor,
                                     int64_t length, const Tensor& input) {
  if (!tensor.has_value()) return std::nullopt;
  DWSWAP_CHECK(tensor->dim() == 1 && tensor->size(0) == length, name, " must be 1-D of length ",
               length, ", got shape ", shape_string(*tensor));
  check_same(name, *tensor, input);
  return dense(*tensor);
}

// dilation * (kernel - 1) + 1, which may not fit 64 bits for an expanded weight.
std::string extent_string(int64_t kernel, int64_t dilation) {
  int64_t extent = 0;
  const bool fits = !__builtin_mul_overflow(dilation, kernel - 1, &extent) &&
                    !__builtin_add_overflow(extent, 1, &extent);
  return fits ? std::to_string(extent) : "over 2^63";
}

int64_t output_extent(const char* dimension, int64_t size, int64_t kernel, int64_t stride,
                      int64_t padding, int64_t dilation) {
  constexpr int64_t kLimit = int64_t{1} << 40;
  DWSWAP_CHECK(stride < kLimit && padding < kLimit && dilation < kLimit,
               "stride, padding and dilation must be below 2^40, got ", stride, ", ", padding, ", ",
               dilation, " along the ", dimension);
  const int64_t padded = size + 2 * padding;
  // Divided, as the product may not fit 64 bits.
  DWSWAP_CHECK(kernel - 1 <= (padded - 1) / dilation, "the kernel must fit into the padded input; ",
               "along the ", dimension, " it covers ", extent_string(kernel, dilation),
               " elements (dilation ", dilation, "), the padded input has ", padded);
  const int64_t extent = dilation * (kernel - 1) + 1;
  return (padded - extent) / stride + 1;
}

// Not torch::stable::empty: aten::empty by way of the dispatcher takes a microsecond more. The
// stable ABI reports a failed allocation as any other failure; Python turns this text back into
// torch.OutOfMemoryError.
Tensor allocate(const DepthwiseConv2dParams& p, const Tensor& like) {
  const int64_t sizes[4] = {p.batch, p.out_channels(), p.out_h, p.out_w};
  const int64_t strides[4] = {p.out_stride.n, p.out_stride.c, p.out_stride.h, p.out_stride.w};
  const int64_t dimensions = like.dim();
  int32_t dtype = 0, device_type = 0;
  AtenTensorHandle handle = nullptr;
  const bool allocated =
      aoti_torch_get_dtype(like.get(), &dtype) == AOTI_TORCH_SUCCESS &&
      aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
      aoti_torch_empty_strided(dimensions, sizes + 4 - dimensions, strides + 4 - dimensions, dtype,
                               device_type, like.get_device_index(), &handle) == AOTI_TORCH_SUCCESS;
  DWSWAP_CHECK(allocated, "CUDA out of memory. The output of shape ",
               shape_string(std::array{p.batch, p.out_channels(), p.out_h, p.out_w}),
               " could not be allocated");
  return Tensor(handle);
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
                                    pair(options.stride),
                                    pair(options.padding),
                                    pair(options.dilation),
                                    from(input_bias),
                                    name(options.input_activation),
                                    name(options.activation)};
  DWSWAP_CHECK(torch_call_dispatcher("dwswap::_depthwise_conv2d_aten", "", stack.data(),
                                     TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
               "aten::conv2d, which computes what has no kernel here, failed for dtype ",
               torch::headeronly::toString(input.scalar_type()));
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
  DWSWAP_CHECK(input.dim() == 3 || input.dim() == 4,
               "input must be 4-D (N, C, H, W) or 3-D (C, H, W), got shape ", shape_string(input));
  const Image in(input);
  DWSWAP_CHECK(in.c > 0 && in.h > 0 && in.w > 0,
               "input must have C, H and W of at least 1, got shape ", shape_string(input));
  DWSWAP_CHECK(weight.dim() == 4 && weight.size(1) == 1,
               "weight must be 4-D with one input channel per group (C * m, 1, kH, kW), got shape ",
               shape_string(weight));
  DWSWAP_CHECK(weight.size(0) > 0 && weight.size(0) % in.c == 0,
               "weight.shape[0] must be a multiple of the input's ", in.c, " channels, got ",
               weight.size(0));
  DWSWAP_CHECK(weight.size(2) > 0 && weight.size(3) > 0,
               "weight must have a kernel of at least 1 x 1, got shape ", shape_string(weight));
  check_same("weight", weight, input);

  DepthwiseConv2dParams p{};
  const auto& [s, pad, d, input_activation, activation] = options;
  check_pair("stride", s, 1), check_pair("padding", pad, 0), check_pair("dilation", d, 1);
  p.batch = in.n, p.channels = in.c, p.multiplier = weight.size(0) / in.c;
  p.in_h = in.h, p.in_w = in.w;
  p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  p.stride_h = s.h, p.stride_w = s.w;
  p.padding_h = pad.h, p.padding_w = pad.w;
  p.dilation_h = d.h, p.dilation_w = d.w;
  p.out_h = output_extent("height", p.in_h, p.kernel_h, s.h, pad.h, d.h);
  p.out_w = output_extent("width", p.in_w, p.kernel_w, s.w, pad.w, d.w);
  DWSWAP_CHECK(static_cast<double>(p.batch) * static_cast<double>(p.out_channels()) *
                       static_cast<double>(p.out_h) * static_cast<double>(p.out_w) <
                   kMostElements,
               "the output must have fewer than 2^60 elements, got shape ",
               shape_string(std::array{p.batch, p.out_channels(), p.out_h, p.out_w}));
  p.input_activation = input_activation, p.activation = activation;
  const auto bias_vector = checked_vector("bias", bias, p.out_channels(), input);
  const auto input_bias_vector = checked_vector("input_bias", input_bias, p.channels, input);

  const auto dtype = data_type(input.scalar_type());
  // The library holds no code for an older GPU beside a supported one.
  if (!dtype.has_value() || current_device().major < 8) return std::nullopt;
  p.dtype = *dtype;
  // The rule of aten::conv2d: dwswap/layouts.py.
  const bool channels_last = *dtype != DataType::kFloat64 &&
                             (suggests_channels_last(in) || suggests_channels_last(Image(weight)));
  p.in_stride = in.stride;
  p.out_layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  const int64_t k = p.out_channels(), plane = p.out_h * p.out_w;
  p.out_stride =
      channels_last ? Strides{plane * k, 1, p.out_w * k, k} : Strides{k * plane, plane, p.out_w, 1};
  // An image with one channel or one pixel has both layouts: take the output's.
  const bool matches = channels_last ? in.channels_last() : in.contiguous();
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
  check_cuda(input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto problem = describe(input, weight, bias, options, input_bias);
  if (!problem) return call_aten(input, weight, bias, options, input_bias);
  DepthwiseConv2dParams& p = problem->params;
  const Tensor output = allocate(p, input);
  if (p.batch == 0) return output;
  p.output = output.mutable_data_ptr();

  void* stream = nullptr;
  DWSWAP_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
               "no CUDA stream for device ", device);
  const Choice choice = choose_forward(p);
  const cudaError_t status = choice.launch(p, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess)
    cudaGetLastError();  // else the next launch of anybody reports it again
  DWSWAP_CHECK(status == cudaSuccess, "the launch of the ", choice.family,
               " kernel failed: ", cudaGetErrorString(status));
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
  const auto [before, after] = std::pair(activations / 16, activations % 16);
  constexpr auto kKnown = static_cast<int64_t>(kActivationNames.size());
  DWSWAP_CHECK(activations >= 0 && before < kKnown && after < kKnown,
               "activations must be indices of known ones, got ", activations);
  const Options options{{stride_h, stride_w},
                        {padding_h, padding_w},
                        {dilation_h, dilation_w},
                        static_cast<Activation>(before),
                        static_cast<Activation>(after)};
  return run(input, weight, bias, options, input_bias);
}

// The name of the family of kernels that would run, or "aten".
std::string depthwise_conv2d_family(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& input_bias,
    const std::string& input_activation, const std::string& activation) {
  check_cuda(input);
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
