// What the host code of every operator asks of its tensors. `op` is the operator's name, for
// messages.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/check.h"
#include "common/data_type.h"
#include "common/device.h"

namespace dwswap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kMostElements = 0x1p60;  // their bytes still fit 63 bits

inline std::optional<DataType> data_type(ScalarType type) {
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

// Nothing where aten has to compute: for other dtypes, and on GPUs that the library has no code
// for.
inline std::optional<DataType> kernel_data_type(const Tensor& input) {
  return current_device().major < 8 ? std::nullopt : data_type(input.scalar_type());
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
inline bool suggests_channels_last(const Image& image) {
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

inline void check_cuda(const char* op, const Tensor& input) {
  DWSWAP_CHECK_IN(op, input.is_cuda(),
                  "input must be on the device of the other tensors, got a tensor on ",
                  input.is_cpu() ? "the CPU" : "another kind of device");
}

// An image without gaps, in a dtype whose sums are float32.
struct DenseImage : Image {
  DataType dtype;
  Layout layout;

  DenseImage(const Image& image, DataType type)
      : Image(image),
        dtype(type),
        layout(image.channels_last() ? Layout::kChannelsLast : Layout::kContiguous) {}
};

inline DenseImage checked_image(const char* op, const Tensor& input) {
  check_cuda(op, input);
  DWSWAP_CHECK_IN(op, input.dim() == 4, "input must be 4-D (N, C, H, W), got shape ",
                  shape_string(input));
  const auto dtype = kernel_data_type(input);
  DWSWAP_CHECK_IN(op, dtype.has_value() && *dtype != DataType::kFloat64,
                  "input must be float32, float16 or bfloat16 on a GPU of sm_80 or later, got ",
                  torch::headeronly::toString(input.scalar_type()));
  const Image image(input);
  DWSWAP_CHECK_IN(op, image.channels_last() || image.contiguous(),
                  "input must be dense, contiguous or channels_last, got strides ",
                  shape_string(input.strides()), " for shape ", shape_string(input));
  return {image, *dtype};
}

// Asked first: a call of aten's contiguous costs microseconds.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::string device_string(const Tensor& tensor) {
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "cpu" : "another kind of device";
}

inline bool on_device_of(const Tensor& tensor, const Tensor& input) {
  return tensor.is_cuda() && tensor.get_device_index() == input.get_device_index();
}

inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& input) {
  DWSWAP_CHECK_IN(op, on_device_of(tensor, input), name,
                  " must be on the input's device, cuda:", input.get_device_index(), ", got ",
                  device_string(tensor));
}

inline void check_same(const char* op, const char* name, const Tensor& tensor,
                       const Tensor& input) {
  check_device(op, name, tensor, input);
  DWSWAP_CHECK_IN(op, tensor.scalar_type() == input.scalar_type(), name,
                  " must have the input's dtype ", torch::headeronly::toString(input.scalar_type()),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

// Of (N, C, H, W) without gaps.
inline Strides dense_strides(int64_t c, int64_t h, int64_t w, Layout layout) {
  return layout == Layout::kChannelsLast ? Strides{h * w * c, 1, w * c, c}
                                         : Strides{c * h * w, h * w, w, 1};
}

// Not torch::stable::empty: aten::empty by way of the dispatcher takes a microsecond more. The
// stable ABI reports a failed allocation as any other failure; Python turns this text back into
// torch.OutOfMemoryError.
inline Tensor allocate(const char* op, const char* what, const int64_t* sizes,
                       const int64_t* strides, int64_t dimensions, const Tensor& like,
                       int32_t dtype) {
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  const bool allocated =
      aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
      aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device_type,
                               like.get_device_index(), &handle) == AOTI_TORCH_SUCCESS;
  DWSWAP_CHECK_IN(op, allocated, "CUDA out of memory. The ", what, " of shape ",
                  shape_string(std::vector<int64_t>(sizes, sizes + dimensions)),
                  " could not be allocated");
  return Tensor(handle);
}

inline int32_t dtype_of(const char* op, const Tensor& tensor) {
  int32_t dtype = 0;
  DWSWAP_CHECK_IN(op, aoti_torch_get_dtype(tensor.get(), &dtype) == AOTI_TORCH_SUCCESS,
                  "the input must have a dtype");
  return dtype;
}

inline Tensor allocate_like(const char* op, const char* what, const Tensor& tensor) {
  return allocate(op, what, tensor.sizes().data(), tensor.strides().data(), tensor.dim(), tensor,
                  dtype_of(op, tensor));
}

// (N, C, H, W), or without N where `like` has none.
inline Tensor allocate_image(const char* op, const char* what, int64_t n, int64_t c, int64_t h,
                             int64_t w, const Strides& stride, const Tensor& like) {
  const int64_t sizes[4] = {n, c, h, w};
  const int64_t strides[4] = {stride.n, stride.c, stride.h, stride.w};
  const int64_t dimensions = like.dim();
  return allocate(op, what, sizes + 4 - dimensions, strides + 4 - dimensions, dimensions, like,
                  dtype_of(op, like));
}

// The current stream of a device.
inline cudaStream_t current_stream(const char* op, int32_t device) {
  void* stream = nullptr;
  DWSWAP_CHECK_IN(op, aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "no CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t status, const char* family) {
  if (status != cudaSuccess)
    cudaGetLastError();  // else the next launch of anybody reports it again
  DWSWAP_CHECK_IN(op, status == cudaSuccess, "the launch of the ", family,
                  " kernel failed: ", cudaGetErrorString(status));
}

inline void add_shape(std::string& shapes, const Tensor& tensor) {
  shapes += (shapes.empty() ? "" : ", ") + shape_string(tensor);
}
inline void add_shape(std::string& shapes, const std::optional<Tensor>& tensor) {
  if (tensor.has_value()) add_shape(shapes, *tensor);
}
template <typename Other>
void add_shape(std::string&, const Other&) {}

// The result of the operator `name` with the same arguments, which computes what has no kernel
// here, by means that the message names.
template <typename... Given>
Tensor call_instead(const char* op, const char* name, const char* means, const Given&... given) {
  std::array<StableIValue, sizeof...(Given)> stack{torch::stable::detail::from(given)...};
  const bool succeeded =
      torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS;
  std::string shapes;
  if (!succeeded) (add_shape(shapes, given), ...);
  DWSWAP_CHECK_IN(op, succeeded, "what has no kernel here is computed by ", means,
                  ", which failed for shapes ", shapes);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline std::optional<Tensor> checked_vector(const char* op, const char* name,
                                            const std::optional<Tensor>& tensor, int64_t length,
                                            const Tensor& input) {
  if (!tensor.has_value()) return std::nullopt;
  DWSWAP_CHECK_IN(op, tensor->dim() == 1 && tensor->size(0) == length, name,
                  " must be 1-D of length ", length, ", got shape ", shape_string(*tensor));
  check_same(op, name, *tensor, input);
  return dense(*tensor);
}

inline constexpr std::array<const char*, 9> kActivationNames = {
    "none", "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "hardsigmoid", "sigmoid"};

inline Activation parse_activation(const char* op, const char* argument, const std::string& name) {
  for (size_t i = 0; i < kActivationNames.size(); ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  std::string known;
  for (const char* entry : kActivationNames)
    known += (known.empty() ? "" : ", ") + std::string(entry);
  DWSWAP_CHECK_IN(op, false, argument, " must be one of ", known, ", got '", name, "'");
}

// Two at once: the index of the first, times 16, and that of the second.
inline std::pair<Activation, Activation> parse_activations(const char* op, int64_t number) {
  const int64_t first = number / 16, second = number % 16;
  constexpr auto kKnown = static_cast<int64_t>(kActivationNames.size());
  DWSWAP_CHECK_IN(op, number >= 0 && first < kKnown && second < kKnown,
                  "activations must be indices of known ones, got ", number);
  return {static_cast<Activation>(first), static_cast<Activation>(second)};
}

}  // namespace dwswap
