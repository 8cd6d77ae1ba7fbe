// What the kernels that normalize over channels get.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/data_type.h"

namespace dwswap {

// y[r, c] = (x[r, c] - mean of row r) / sqrt(variance of row r + eps) * weight[c] + bias[c]
// A row is the channels of a pixel; rows follow one another without gaps.
struct ChannelNormParams {
  const void* input;
  const void* weight;  // (channels) or null
  const void* bias;    // (channels) or null
  void* output;
  int64_t rows, channels;
  float eps;
  DataType dtype;
};

// Whether there is a kernel that is faster than aten's block for every row.
bool covers_channel_norm(const ChannelNormParams& params);
// On `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_channel_norm(const ChannelNormParams& params, cudaStream_t stream);

}  // namespace dwswap
