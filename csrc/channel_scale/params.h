// What the kernels that scale the channels of images get.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"
#include "common/planes.h"

namespace dwswap {

// Per image n and channel c:
//   y = x * gate(z[n, c]) + spread[n, c] / pixels
//   gate_gradients[n, c] = gate'(z[n, c]) * sum over the pixels of dy * x
struct ChannelScaleParams : Planes {
  const void* input;            // x
  const void* output_gradient;  // dy, of the gradients of gates alone
  const void* gates;            // z: (batch, channels), dense, of the input's type or narrower
  const void* spread;           // (batch, channels), dense, of the input's type, or null
  void* output;                 // y
  void* gate_gradients;         // (batch, channels), dense, of the type of the gates
  float* partials;              // sums of parts of the images: (parts, batch, channels)
  Activation activation;        // the gate: none, sigmoid or hardsigmoid
  DataType dtype, gate_type;
  Layout layout;
};

}  // namespace dwswap
