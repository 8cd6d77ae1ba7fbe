// The CUDA kernel of torch.ops.dwswap._interleave_channels: check, describe, allocate, launch.
// Schema: dwswap/schema.py. Everything else: dwswap/shuffling.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "interleave_channels/params.h"

namespace dwswap {
namespace {

constexpr const char* kOperator = "dwswap._interleave_channels";

Tensor call_aten(const Tensor& first, const Tensor& second, const std::optional<Tensor>& first_bias,
                 const std::optional<Tensor>& second_bias, int64_t activations,
                 bool channels_last) {
  return call_instead(kOperator, "dwswap::_interleave_channels_aten", "aten", first, second,
                      first_bias, second_bias, activations, channels_last);
}

// Elements from row to row of an image whose rows are one after another; nothing where they are
// not.
std::optional<int64_t> row_pitch(const Image& image, bool channels_last) {
  if (!channels_last) {
    const bool dense =
        (image.w == 1 || image.stride.w == 1) && (image.h == 1 || image.stride.h == image.w);
    if (!dense) return std::nullopt;
    return image.c == 1 ? image.h * image.w : image.stride.c;
  }
  if (image.c != 1 && image.stride.c != 1) return std::nullopt;
  if (image.w == 1) return image.h == 1 ? image.c : image.stride.h;
  if (image.h != 1 && image.stride.h != image.w * image.stride.w) return std::nullopt;
  return image.stride.w;
}

// Some of the channels of a wider image are read where they are.
Tensor described(InterleavedImage& image, const Tensor& tensor, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (const auto pitch = row_pitch(Image(tensor), channels_last)) {
    image.data = tensor.const_data_ptr(), image.row_pitch = *pitch;
    image.image_pitch = tensor.size(0) == 1 ? 0 : tensor.stride(0);
    return tensor;
  }
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return described(image, torch::stable::contiguous(tensor, format), channels_last);
}

// `activations`: the index of that of the first, times 16, and that of the second.
Tensor interleave_channels(const Tensor& first, const Tensor& second,
                           const std::optional<Tensor>& first_bias,
                           const std::optional<Tensor>& second_bias, int64_t activations,
                           bool channels_last) {
  check_cuda(kOperator, first);
  const int32_t device = first.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto dtype = kernel_data_type(first);
  bool covered = dtype.has_value() && first.dim() == 4 && second.dim() == 4 && second.is_cuda() &&
                 second.scalar_type() == first.scalar_type();
  for (int64_t d = 0; covered && d < 4; ++d) covered = first.size(d) == second.size(d);
  InterleaveParams p{};
  if (covered) {
    p.dtype = *dtype;
    p.layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
    p.batch = first.size(0), p.channels = first.size(1), p.pixels = first.size(2) * first.size(3);
  }
  if (!covered || !covers_interleave(p))
    return call_aten(first, second, first_bias, second_bias, activations, channels_last);
  check_same(kOperator, "second", second, first);
  std::tie(p.images[0].activation, p.images[1].activation) =
      parse_activations(kOperator, activations);
  const std::optional<Tensor> biases[2] = {
      checked_vector(kOperator, "first_bias", first_bias, p.channels, first),
      checked_vector(kOperator, "second_bias", second_bias, p.channels, first)};
  const int64_t height = first.size(2), width = first.size(3);
  const Tensor output =
      allocate_image(kOperator, "output", p.batch, 2 * p.channels, height, width,
                     dense_strides(2 * p.channels, height, width, p.layout), first);
  if (p.batch * p.channels * p.pixels == 0) return output;
  const Tensor images[2] = {described(p.images[0], first, channels_last),
                            described(p.images[1], second, channels_last)};
  for (int i = 0; i < 2; ++i) {
    if (biases[i].has_value()) p.images[i].bias = biases[i]->const_data_ptr();
  }
  p.output = output.mutable_data_ptr();
  check_launch(kOperator, launch_interleave(p, current_stream(kOperator, device)), "interleave");
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("_interleave_channels", TORCH_BOX(&interleave_channels));
}

}  // namespace dwswap
