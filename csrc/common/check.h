// Checks whose messages name the argument, the requirement and the value.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

#define DWSWAP_CHECK_IN(op, condition, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)
#define DWSWAP_CHECK(condition, ...) \
  DWSWAP_CHECK_IN("dwswap.depthwise_conv2d", condition, __VA_ARGS__)

namespace dwswap {

template <typename Sizes>
std::string shape_string(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  out << ']';
  return out.str();
}

inline std::string shape_string(const torch::stable::Tensor& tensor) {
  return shape_string(tensor.sizes());
}

}  // namespace dwswap
