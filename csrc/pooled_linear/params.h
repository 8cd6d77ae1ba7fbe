// What the kernel of a linear layer on the means of an image gets.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"
#include "common/device.h"

namespace dwswap {

// y[k] = activation(bias[k] + sum over c of weight[k, c] means[c]), where
// means[c] = mean of input_activation(x[c] + input_bias[c]) over the pixels
struct PooledLinearParams {
  const void* input;       // (channels, pixels), channels_last
  const void* input_bias;  // (channels) or null
  const void* weight;      // (outputs, channels), the outputs of a channel side by side
  const void* bias;        // (outputs) or null
  void* output;            // (outputs)

  int32_t channels, pixels, outputs;
  Activation input_activation, activation;
  DataType dtype;
};

// Whether there is a kernel.
bool covers_pooled_linear(const PooledLinearParams& params, const Device& device);
// On `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_pooled_linear(const PooledLinearParams& params, cudaStream_t stream);

}  // namespace dwswap
