// What the kernels of the first layer of a network get.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"
#include "common/device.h"

namespace dwswap {

// y = activation(bias + conv(x)): 3 x 3 taps on 3 channels, stride 2, padding 1
struct StemConv2dParams {
  const void* input;   // (batch, 3, height, width), dense in `layout`
  const void* weight;  // (channels, 3, 3, 3), 27 elements of a channel side by side
  const void* bias;    // (channels) or null
  void* output;        // (batch, channels, out_h, out_w), channels_last
  int64_t batch, height, width, channels;
  int64_t weight_plane, weight_row, weight_column;  // strides
  Activation activation;
  DataType dtype;
  Layout layout;

  int64_t out_h() const { return (height + 1) / 2; }
  int64_t out_w() const { return (width + 1) / 2; }
};

// Whether there is a kernel.
bool covers_stem_conv2d(const StemConv2dParams& params);
// On `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_stem_conv2d(const StemConv2dParams& params, const Device& device,
                               cudaStream_t stream);

}  // namespace dwswap
