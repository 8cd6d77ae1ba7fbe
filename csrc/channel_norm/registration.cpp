// The CUDA kernel of torch.ops.dwswap._channel_norm: check, describe, allocate, launch.
// Schema: dwswap/schema.py. Everything else: dwswap/norms.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "channel_norm/params.h"
#include "common/tensor.h"

namespace dwswap {
namespace {

constexpr const char* kOperator = "dwswap._channel_norm";

Tensor call_aten(const Tensor& input, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, double eps, bool last) {
  return call_instead(kOperator, "dwswap::_channel_norm_aten", "aten", input, weight, bias, eps,
                      last);
}

// Rows and channels, where the channels of a pixel are side by side and pixels have no gaps.
bool describe(ChannelNormParams& p, const Tensor& input, bool last) {
  if (last) {
    if (!input.is_contiguous()) return false;
    p.channels = input.size(input.dim() - 1);
    p.rows = p.channels == 0 ? 0 : input.numel() / p.channels;
    return true;
  }
  const Image image(input);
  p.channels = image.c, p.rows = image.n * image.h * image.w;
  return image.channels_last();
}

// As aten's result has them: dense, in the order of the input's dimensions or channels_last.
Tensor allocate_result(const Tensor& input, bool last) {
  const auto sizes = input.sizes();
  const size_t dimensions = sizes.size();
  std::vector<size_t> order(dimensions);
  for (size_t d = 0; d < dimensions; ++d) order[d] = d;
  if (!last) std::rotate(order.end() - 3, order.end() - 2, order.end());
  std::vector<int64_t> strides(dimensions);
  int64_t stride = 1;
  for (size_t i = dimensions; i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return allocate(kOperator, "output", sizes.data(), strides.data(),
                  static_cast<int64_t>(dimensions), input, dtype_of(kOperator, input));
}

Tensor channel_norm(const Tensor& input, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, double eps, bool last) {
  check_cuda(kOperator, input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t dimensions = input.dim();
  DWSWAP_CHECK_IN(kOperator, last ? dimensions > 0 : dimensions == 3 || dimensions == 4,
                  "input must be ",
                  last ? "at least 1-D (..., C)" : "4-D (N, C, H, W) or 3-D (C, H, W)",
                  ", got shape ", shape_string(input));
  const auto dtype = kernel_data_type(input);
  ChannelNormParams p{};
  if (!dtype.has_value() || !describe(p, input, last))
    return call_aten(input, weight, bias, eps, last);
  p.dtype = *dtype;
  if (!covers_channel_norm(p)) return call_aten(input, weight, bias, eps, last);
  const std::optional<Tensor> factors =
      checked_vector(kOperator, "weight", weight, p.channels, input);
  const std::optional<Tensor> added = checked_vector(kOperator, "bias", bias, p.channels, input);

  const Tensor output = allocate_result(input, last);
  if (p.rows == 0) return output;
  p.input = input.const_data_ptr(), p.output = output.mutable_data_ptr();
  if (factors.has_value()) p.weight = factors->const_data_ptr();
  if (added.has_value()) p.bias = added->const_data_ptr();
  p.eps = static_cast<float>(eps);
  check_launch(kOperator, launch_channel_norm(p, current_stream(kOperator, device)), "norm");
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) { m.impl("_channel_norm", TORCH_BOX(&channel_norm)); }

}  // namespace dwswap
