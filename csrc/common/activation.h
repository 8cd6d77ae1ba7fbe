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

}  // namespace dwswap
