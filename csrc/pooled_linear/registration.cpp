// The CUDA kernel of torch.ops.dwswap._pooled_linear: check, describe, allocate, launch.
// Schema: dwswap/schema.py. Everything else: dwswap/classifiers.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/device.h"
#include "common/tensor.h"
#include "pooled_linear/params.h"

namespace dwswap {
namespace {

constexpr const char* kOperator = "dwswap._pooled_linear";

// Whether there are a kernel and tensors as it takes them.
bool describe(PooledLinearParams& p, const Tensor& input, const Tensor& weight,
              const std::optional<Tensor>& input_bias) {
  const auto dtype = kernel_data_type(input);
  if (!dtype.has_value() || input.dim() != 4 || weight.dim() != 2) return false;
  const Image image(input);
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  if (image.n != 1 || image.c != channels || !image.channels_last()) return false;
  if (weight.stride(0) != 1 || weight.stride(1) != outputs) return false;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (channels > kMost || outputs > kMost || image.h > kMost || image.w > kMost ||
      image.h * image.w > kMost)
    return false;
  p.channels = static_cast<int32_t>(channels), p.outputs = static_cast<int32_t>(outputs);
  p.pixels = static_cast<int32_t>(image.h * image.w);
  p.dtype = *dtype;
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr();
  if (input_bias.has_value()) p.input_bias = input_bias->const_data_ptr();
  return covers_pooled_linear(p, current_device());
}

Tensor pooled_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& input_bias, int64_t activations) {
  check_cuda(kOperator, input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  PooledLinearParams p{};
  if (!describe(p, input, weight, input_bias))
    return call_instead(kOperator, "dwswap::_pooled_linear_apart", "a mean and aten's linear",
                        input, weight, bias, input_bias, activations);
  std::tie(p.input_activation, p.activation) = parse_activations(kOperator, activations);
  check_same(kOperator, "weight", weight, input);
  const auto vector = [&](const char* name, const std::optional<Tensor>& given, int64_t length) {
    return checked_vector(kOperator, name, given, length, input);
  };
  const std::optional<Tensor> added = vector("bias", bias, p.outputs);
  const std::optional<Tensor> before = vector("input_bias", input_bias, p.channels);
  if (added.has_value()) p.bias = added->const_data_ptr();
  if (before.has_value()) p.input_bias = before->const_data_ptr();

  const int64_t sizes[2] = {1, p.outputs}, strides[2] = {p.outputs, 1};
  const Tensor output =
      allocate(kOperator, "output", sizes, strides, 2, input, dtype_of(kOperator, input));
  p.output = output.mutable_data_ptr();
  check_launch(kOperator, launch_pooled_linear(p, current_stream(kOperator, device)), "linear");
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) { m.impl("_pooled_linear", TORCH_BOX(&pooled_linear)); }

}  // namespace dwswap
