// The arguments of the operator and of its gradients: checked, and as kernels get them.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {

inline constexpr const char* kOperator = "dwswap.depthwise_conv2d";

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
  check_same(kOperator, "weight", weight, input);

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

// The rule of aten::conv2d: dwswap/layouts.py.
inline Layout output_layout(const Image& input, const Tensor& weight, DataType type) {
  const bool channels_last = type != DataType::kFloat64 && (suggests_channels_last(input) ||
                                                            suggests_channels_last(Image(weight)));
  return channels_last ? Layout::kChannelsLast : Layout::kContiguous;
}

}  // namespace dwswap
