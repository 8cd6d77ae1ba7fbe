// The activations that kernels absorb. Numbering: dwswap/activations.py.
#pragma once

namespace dwswap {

enum class Activation : int {
  kNone = 0,
  kRelu,
  kRelu6,
  kHardswish,
  kSilu,
  kGelu,
  kGeluTanh,
  kHardsigmoid,
  kSigmoid,
};
// Kernels ask for "at most kRelu" and "at most kRelu6".
static_assert(Activation::kNone < Activation::kRelu && Activation::kRelu < Activation::kRelu6);

}  // namespace dwswap
