// What the kernels of batch normalization in training get.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"
#include "common/planes.h"

namespace dwswap {

// Per channel c, over the values x of a batch of images:
//   z = (x - mean[c]) / sqrt(variance[c] + eps) * weight[c] + bias[c],  y = activation(z)
struct BatchNormParams : Planes {
  const void* input;
  const void* output_gradient;  // of the backward only
  void* output;                 // of the backward the gradient of the input, or null
  const void* weight;           // (channels) or null, as bias
  const void* bias;
  void* running_mean;  // (channels) or null, as running_var
  void* running_var;
  int64_t* batches;       // how many were seen, or null
  void* weight_gradient;  // (channels) or null, as bias_gradient
  void* bias_gradient;
  float* partials;  // Cut::partials() sums of parts of the batch
  float* stats;     // (4, channels): mean, 1 / sqrt(variance + eps), that times weight, bias
  float* terms;     // (2, channels), of the backward: what the gradient of the input adds
  float momentum, eps;
  Layout layout;
  DataType dtype, parameter_type, running_type;
  Activation activation;
};

}  // namespace dwswap
