// The CUDA kernel of torch.ops.dwswap._channel_means: check, describe, allocate, launch.
// Schema: dwswap/schema.py. Everything else: dwswap/means.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "channel_means/params.h"
#include "common/tensor.h"

namespace dwswap {
namespace {

constexpr const char* kOperator = "dwswap._channel_means";

Tensor call_aten(const Tensor& input, const std::optional<Tensor>& bias, int64_t activations) {
  return call_instead(kOperator, "dwswap::_channel_means_aten", "aten", input, bias, activations);
}

// `activations`: the index of that behind the bias, as the second of two.
Tensor channel_means(const Tensor& input, const std::optional<Tensor>& bias, int64_t activations) {
  check_cuda(kOperator, input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto dtype = kernel_data_type(input);
  if (!dtype.has_value() || input.dim() != 4) return call_aten(input, bias, activations);
  const Image image(input);
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool countable = image.n <= kMost && image.c <= kMost && image.h <= kMost &&
                         image.w <= kMost && image.h * image.w <= kMost;
  if (!countable) return call_aten(input, bias, activations);
  ChannelMeansParams p{};
  p.batch = static_cast<int32_t>(image.n), p.channels = static_cast<int32_t>(image.c);
  p.pixels = static_cast<int32_t>(image.h * image.w);
  p.dtype = *dtype;
  p.layout = suggests_channels_last(image) ? Layout::kChannelsLast : Layout::kContiguous;
  if (!covers_channel_means(p)) return call_aten(input, bias, activations);
  p.activation = parse_activations(kOperator, activations).second;
  const std::optional<Tensor> added = checked_vector(kOperator, "bias", bias, image.c, input);

  const int64_t sizes[2] = {image.n, image.c}, strides[2] = {image.c, 1};
  const Tensor means =
      allocate(kOperator, "output", sizes, strides, 2, input, dtype_of(kOperator, input));
  if (image.n * image.c == 0) return means;
  using torch::headeronly::MemoryFormat;
  const bool channels_last = p.layout == Layout::kChannelsLast;
  const bool is_dense = channels_last ? image.channels_last() : image.contiguous();
  const Tensor dense_input =
      is_dense ? input
               : torch::stable::contiguous(
                     input, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  p.input = dense_input.const_data_ptr(), p.means = means.mutable_data_ptr();
  if (added.has_value()) p.bias = added->const_data_ptr();
  check_launch(kOperator, launch_channel_means(p, current_stream(kOperator, device)), "mean");
  return means;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) { m.impl("_channel_means", TORCH_BOX(&channel_means)); }

}  // namespace dwswap
