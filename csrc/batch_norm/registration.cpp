// The CUDA kernels of torch.ops.dwswap._batch_norm and _batch_norm_backward: check, describe,
// allocate, launch. Schema: dwswap/schema.py. Who calls them, and when: dwswap/batch_norm.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm/launch.h"
#include "common/tensor.h"

namespace dwswap {
namespace {

constexpr const char* kForward = "dwswap._batch_norm";
constexpr const char* kBackward = "dwswap._batch_norm_backward";
constexpr int64_t kStatistics = 4, kTerms = 2;  // rows of BatchNormParams

// The extents, layout, types and numbers of a call.
BatchNormParams describe(const char* op, const Tensor& input, int64_t activation) {
  const DenseImage image = checked_image(op, input);
  BatchNormParams p{};
  p.dtype = image.dtype, p.layout = image.layout;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  DWSWAP_CHECK_IN(op, std::max({image.n, image.c, image.h * image.w}) <= kMost,
                  "input must have fewer than 2^31 images, channels and pixels, got shape ",
                  shape_string(input));
  p.batch = static_cast<int32_t>(image.n), p.channels = static_cast<int32_t>(image.c);
  p.pixels = static_cast<int32_t>(image.h * image.w);
  DWSWAP_CHECK_IN(op, covers_batch_norm(p),
                  "input must have 2 to 2^30 values for each channel, got shape ",
                  shape_string(input));
  const auto [before, behind] = parse_activations(op, activation);
  DWSWAP_CHECK_IN(op, before == Activation::kNone && behind <= Activation::kSilu,
                  "activation must be none, relu, relu6, hardswish or silu, got index ",
                  activation);
  p.activation = behind;
  return p;
}

// A vector of a value per channel on the input's device, float32 or of the input's dtype, and of
// the type of those before it. Its data, or null for none.
void* channel_data(const char* op, const char* name, const std::optional<Tensor>& tensor,
                   const Tensor& input, DataType& type, const char*& typed_by) {
  if (!tensor.has_value()) return nullptr;
  const int64_t channels = input.size(1);
  DWSWAP_CHECK_IN(op, tensor->dim() == 1 && tensor->size(0) == channels, name,
                  " must be 1-D of length ", channels, ", got shape ", shape_string(*tensor));
  DWSWAP_CHECK_IN(op, tensor->is_contiguous(), name, " must be contiguous, got stride ",
                  tensor->stride(0));
  check_device(op, name, *tensor, input);
  const ScalarType given = tensor->scalar_type();
  DWSWAP_CHECK_IN(op, given == ScalarType::Float || given == input.scalar_type(), name,
                  " must be float32 or have the input's dtype ",
                  torch::headeronly::toString(input.scalar_type()), ", got ",
                  torch::headeronly::toString(given));
  DWSWAP_CHECK_IN(op, typed_by == nullptr || *data_type(given) == type, name,
                  " must have the dtype of ", typed_by, ", got ",
                  torch::headeronly::toString(given));
  type = *data_type(given), typed_by = name;
  return tensor->mutable_data_ptr();
}

// (rows, columns) of float32.
Tensor allocate_floats(const char* op, const char* what, int64_t rows, int64_t columns,
                       const Tensor& like) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  return allocate(op, what, sizes, strides, 2, like, aoti_torch_dtype_float32());
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& running_mean,
                                   const std::optional<Tensor>& running_var,
                                   const std::optional<Tensor>& batches, double momentum,
                                   double eps, int64_t activation) {
  BatchNormParams p = describe(kForward, input, activation);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* typed_by = nullptr;
  p.weight = channel_data(kForward, "weight", weight, input, p.parameter_type, typed_by);
  p.bias = channel_data(kForward, "bias", bias, input, p.parameter_type, typed_by);
  typed_by = nullptr;
  p.running_mean =
      channel_data(kForward, "running_mean", running_mean, input, p.running_type, typed_by);
  p.running_var =
      channel_data(kForward, "running_var", running_var, input, p.running_type, typed_by);
  if (batches.has_value()) {
    DWSWAP_CHECK_IN(kForward,
                    batches->numel() == 1 && batches->scalar_type() == ScalarType::Long &&
                        on_device_of(*batches, input),
                    "batches must be one int64 on the input's device, got shape ",
                    shape_string(*batches), " of ",
                    torch::headeronly::toString(batches->scalar_type()), " on ",
                    device_string(*batches));
    p.batches = static_cast<int64_t*>(batches->mutable_data_ptr());
  }
  const Tensor output = allocate_like(kForward, "output", input);
  const Tensor stats = allocate_floats(kForward, "statistics", kStatistics, p.channels, input);
  p.input = input.const_data_ptr(), p.output = output.mutable_data_ptr();
  const batch_norm::Cut cut = batch_norm::choose_cut(p, current_device().multiprocessors);
  const Tensor partials = allocate_floats(kForward, "sums", 1, cut.partials(), input);
  p.stats = static_cast<float*>(stats.mutable_data_ptr());
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.momentum = static_cast<float>(momentum), p.eps = static_cast<float>(eps);
  check_launch(kForward, launch_batch_norm(p, cut, false, current_stream(kForward, device)),
               "batch norm");
  return {output, stats};
}

// Gradients of input, weight and bias; what is not wanted is undefined.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& stats,
                                            const std::optional<Tensor>& weight, int64_t activation,
                                            const std::vector<bool>& wanted) {
  BatchNormParams p = describe(kBackward, input, activation);
  DWSWAP_CHECK_IN(kBackward, wanted.size() == 3, "output_mask must have 3 entries, got ",
                  wanted.size());
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_same(kBackward, "grad_output", grad_output, input);
  const auto same_sizes = [](const auto& one, const auto& other) {
    return std::equal(one.begin(), one.end(), other.begin(), other.end());
  };
  DWSWAP_CHECK_IN(kBackward, same_sizes(grad_output.sizes(), input.sizes()),
                  "grad_output must have the input's shape ", shape_string(input), ", got ",
                  shape_string(grad_output));
  const Image gradient(grad_output);
  DWSWAP_CHECK_IN(
      kBackward,
      p.layout == Layout::kChannelsLast ? gradient.channels_last() : gradient.contiguous(),
      "grad_output must be laid out as the input, got strides ",
      shape_string(grad_output.strides()));
  DWSWAP_CHECK_IN(kBackward,
                  stats.dim() == 2 && stats.size(0) == kStatistics && stats.size(1) == p.channels &&
                      stats.is_contiguous() && stats.scalar_type() == ScalarType::Float &&
                      on_device_of(stats, input),
                  "stats must be those of the forward, (4, ", p.channels,
                  ") of float32 on the input's device, got shape ", shape_string(stats), " of ",
                  torch::headeronly::toString(stats.scalar_type()), " on ", device_string(stats));
  const char* typed_by = nullptr;
  p.weight = channel_data(kBackward, "weight", weight, input, p.parameter_type, typed_by);
  DWSWAP_CHECK_IN(kBackward, p.weight != nullptr || (!wanted[1] && !wanted[2]),
                  "output_mask must ask for no gradient of weight and bias without a weight");

  std::tuple<Tensor, Tensor, Tensor> gradients;
  auto& [grad_input, grad_weight, grad_bias] = gradients;
  if (wanted[0]) grad_input = allocate_like(kBackward, "gradient of the input", input);
  if (wanted[1]) grad_weight = allocate_like(kBackward, "gradient of the weight", *weight);
  if (wanted[2]) grad_bias = allocate_like(kBackward, "gradient of the bias", *weight);
  p.input = input.const_data_ptr(), p.output_gradient = grad_output.const_data_ptr();
  p.output = wanted[0] ? grad_input.mutable_data_ptr() : nullptr;
  p.weight_gradient = wanted[1] ? grad_weight.mutable_data_ptr() : nullptr;
  p.bias_gradient = wanted[2] ? grad_bias.mutable_data_ptr() : nullptr;
  const batch_norm::Cut cut = batch_norm::choose_cut(p, current_device().multiprocessors);
  const Tensor partials =
      allocate_floats(kBackward, "sums", 1, cut.partials() + kTerms * p.channels, input);
  p.stats = static_cast<float*>(const_cast<void*>(stats.const_data_ptr()));
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.terms = p.partials + cut.partials();
  check_launch(kBackward, launch_batch_norm(p, cut, true, current_stream(kBackward, device)),
               "batch norm");
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("_batch_norm", TORCH_BOX(&forward));
  m.impl("_batch_norm_backward", TORCH_BOX(&backward));
}

}  // namespace dwswap
