// What the kernel that computes the means of channels gets.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"
#include "common/planes.h"

namespace dwswap {

// means[n, c] = mean of activation(x[n, c] + bias[c]) over the pixels
struct ChannelMeansParams : Planes {
  const void* input;
  const void* bias;  // (channels) or null
  void* means;       // (batch, channels), dense
  Activation activation;
  DataType dtype;
  Layout layout;
};

// Whether there is a kernel, and it has enough threads not to be waited for.
bool covers_channel_means(const ChannelMeansParams& params);
// On `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_channel_means(const ChannelMeansParams& params, cudaStream_t stream);

}  // namespace dwswap
