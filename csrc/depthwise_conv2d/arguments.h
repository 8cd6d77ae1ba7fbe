// The arguments of the operator and of its gradients: checked, and as kernels get them.
#pragma once

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

struct Pair {
  int64_t h, w;
};

inline Pair parse_pair(const char* argument, const std::vector<int64_t>& values) {
  DWSWAP_CHECK(values.size() == 1 || values.size() == 2, argument,
               " must be a pair of ints (height, width), got ", shape_string(values));
  return {values.front(), values.back()};
}

inline void check_pair(const char* argument, const Pair& pair, int64_t minimum) {
  DWSWAP_CHECK(pair.h >= minimum && pair.w >= minimum, argument, " must be at least ", minimum,
               ", got ", shape_string(std::array{pair.h, pair.w}));
}

struct Geometry {
  Pair stride, padding, dilation;
};

inline Geometry parse_geometry(const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation) {
  return {parse_pair("stride", stride), parse_pair("padding", padding),
          parse_pair("dilation", dilation)};
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

inline void check_cuda(const Tensor& input) {
  DWSWAP_CHECK(input.is_cuda(),
               "input must be on the device of the other tensors, got a tensor on ",
               input.is_cpu() ? "the CPU" : "another kind of device");
}

// Asked first: a call of aten's contiguous costs microseconds.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_same(const char* name, const Tensor& tensor, const Tensor& input) {
  DWSWAP_CHECK(tensor.is_cuda() && tensor.get_device_index() == input.get_device_index(), name,
               " must be on the input's device, cuda:", input.get_device_index(), ", got ",
               tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                                : std::string(tensor.is_cpu() ? "cpu" : "another kind of device"));
  DWSWAP_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the input's dtype ",
               torch::headeronly::toString(input.scalar_type()), ", got ",
               torch::headeronly::toString(tensor.scalar_type()));
}

// dilation * (kernel - 1) + 1, which may not fit 64 bits for an expanded weight.
inline std::string extent_string(int64_t kernel, int64_t dilation) {
  int64_t extent = 0;
  const bool fits = !__builtin_mul_overflow(dilation, kernel - 1, &extent) &&
                    !__builtin_add_overflow(extent, 1, &extent);
  return fits ? std::to_string(extent) : "over 2^63";
}

inline int64_t output_extent(const char* dimension, int64_t size, int64_t kernel, int64_t stride,
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

// Everything but the pointers, the layouts and the dtype.
inline DepthwiseConv2dParams checked_sizes(const Tensor& input, const Tensor& weight,
                                           const Geometry& geometry) {
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
  const auto& [s, pad, d] = geometry;
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
  return p;
}

// Nothing where aten has to compute: for other dtypes, and on GPUs that the library has no code
// for.
inline std::optional<DataType> kernel_data_type(const Tensor& input) {
  return current_device().major < 8 ? std::nullopt : data_type(input.scalar_type());
}

// The rule of aten::conv2d: dwswap/layouts.py.
inline Layout output_layout(const Image& input, const Tensor& weight, DataType type) {
  const bool channels_last = type != DataType::kFloat64 && (suggests_channels_last(input) ||
                                                            suggests_channels_last(Image(weight)));
  return channels_last ? Layout::kChannelsLast : Layout::kContiguous;
}

// Of (N, C, H, W) without gaps.
inline Strides dense_strides(int64_t c, int64_t h, int64_t w, Layout layout) {
  return layout == Layout::kChannelsLast ? Strides{h * w * c, 1, w * c, c}
                                         : Strides{c * h * w, h * w, w, 1};
}

// Not torch::stable::empty: aten::empty by way of the dispatcher takes a microsecond more. The
// stable ABI reports a failed allocation as any other failure; Python turns this text back into
// torch.OutOfMemoryError.
inline Tensor allocate(const char* what, const int64_t* sizes, const int64_t* strides,
                       int64_t dimensions, const Tensor& like, int32_t dtype) {
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  const bool allocated =
      aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
      aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device_type,
                               like.get_device_index(), &handle) == AOTI_TORCH_SUCCESS;
  DWSWAP_CHECK(allocated, "CUDA out of memory. The ", what, " of shape ",
               shape_string(std::vector<int64_t>(sizes, sizes + dimensions)),
               " could not be allocated");
  return Tensor(handle);
}

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  DWSWAP_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype) == AOTI_TORCH_SUCCESS,
               "the input must have a dtype");
  return dtype;
}

// (N, C, H, W), or without N where `like` has none.
inline Tensor allocate_image(const char* what, int64_t n, int64_t c, int64_t h, int64_t w,
                             const Strides& stride, const Tensor& like) {
  const int64_t sizes[4] = {n, c, h, w};
  const int64_t strides[4] = {stride.n, stride.c, stride.h, stride.w};
  const int64_t dimensions = like.dim();
  return allocate(what, sizes + 4 - dimensions, strides + 4 - dimensions, dimensions, like,
                  dtype_of(like));
}

// The current stream of a device.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  DWSWAP_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
               "no CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t status, const char* family) {
  if (status != cudaSuccess)
    cudaGetLastError();  // else the next launch of anybody reports it again
  DWSWAP_CHECK(status == cudaSuccess, "the launch of the ", family,
               " kernel failed: ", cudaGetErrorString(status));
}

}  // namespace dwswap
