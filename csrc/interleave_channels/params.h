// What the kernels that interleave the channels of two images get.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"

namespace dwswap {

// In channels_last a row is the channels of a pixel, else the pixels of a channel; no row has gaps.
struct InterleavedImage {
  const void* data;
  const void* bias;  // (channels) or null
  Activation activation;
  int64_t row_pitch, image_pitch;  // elements from row to row, and from image to image
};

// y[n, 2 c + i] = activation_i(x_i[n, c] + bias_i[c]) for the images x_0 and x_1; y is dense.
struct InterleaveParams {
  InterleavedImage images[2];
  void* output;
  int64_t batch, channels, pixels;
  DataType dtype;
  Layout layout;

  bool channels_last() const { return layout == Layout::kChannelsLast; }
  int64_t rows() const { return channels_last() ? pixels : channels; }  // of an image
  int64_t row_elements() const { return channels_last() ? channels : pixels; }
};

// Whether accesses, one by one, can be counted in 32 bits, and the type has kernels.
bool covers_interleave(const InterleaveParams& params);
// On `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_interleave(const InterleaveParams& params, cudaStream_t stream);

}  // namespace dwswap
