// What the kernels of a depthwise convolution and the pointwise one behind it get.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {

// y[k] = residual[k] + point_bias[k] + sum over c of point_weight[k, c] h[c] for each pixel, with
// h the output of `depthwise`, rounded
struct SeparableConv2dParams {
  DepthwiseConv2dParams depthwise;  // but for its output
  const void* point_weight;         // (outputs, channels), the channels of an output side by side
  const void* point_bias;           // (outputs) or null
  const void* residual;             // (batch, outputs, out_h, out_w), channels_last, or null
  void* output;                     // the same
  int64_t outputs;
  // Of a block: pixels, and the slice of the channels of which there are so many.
  int32_t pixels, slices;
};

// Whether there is a kernel.
bool covers_separable_conv2d(const SeparableConv2dParams& params, const Device& device);
// On `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_separable_conv2d(const SeparableConv2dParams& params, const Device& device,
                                    cudaStream_t stream);

}  // namespace dwswap
