// What every depthwise_conv2d kernel gets.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"

namespace dwswap {

// y = activation(bias + conv(input_activation(input + input_bias), weight)), zero padding after
// the input activation; output channel k reads input channel k / multiplier.
struct DepthwiseConv2dParams {
  const void* input;
  const void* weight;      // (channels * multiplier, kernel_h, kernel_w), dense
  const void* bias;        // (channels * multiplier) or null
  const void* input_bias;  // (channels) or null
  void* output;

  int64_t batch, channels, multiplier;
  int64_t in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t padding_h, padding_w, dilation_h, dilation_w;
  Strides in_stride, out_stride;

  Activation input_activation, activation;
  // Of every channel, last tap first: what the gradient of the input convolves with. Not every
  // family has it; see Choice.
  bool reversed_taps;
  DataType dtype;
  Layout in_layout, out_layout;

  int64_t out_channels() const { return channels * multiplier; }
  int64_t outputs() const { return batch * out_channels() * out_h * out_w; }
  // Whether an image and its padding, of all channels and samples, have at most so many elements.
  bool is_padded_within(int64_t most) const {
    const int64_t height = in_h + 2 * padding_h, width = in_w + 2 * padding_w;
    return height <= most / width && batch * channels <= most / (height * width);
  }
  bool is_dilated() const { return dilation_h != 1 || dilation_w != 1; }
  // No activation, nor anything that is done to the input.
  bool is_plain() const { return !transforms_input() && activation == Activation::kNone; }
  bool transforms_input() const {
    return input_bias != nullptr || input_activation != Activation::kNone;
  }
};

// Each family says whether it covers a problem, and launches on `stream` of the current device.
// launch_* return the CUDA status of the launch.
bool covers_channel_columns(const DepthwiseConv2dParams& params);
cudaError_t launch_channel_columns(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_channel_direct(const DepthwiseConv2dParams& params);
cudaError_t launch_channel_direct(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_points(const DepthwiseConv2dParams& params);
cudaError_t launch_points(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_channel_tiles(const DepthwiseConv2dParams& params);
cudaError_t launch_channel_tiles(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_diagonal(const DepthwiseConv2dParams& params);
cudaError_t launch_diagonal(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_plane_bands(const DepthwiseConv2dParams& params);
cudaError_t launch_plane_bands(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_plane_strips(const DepthwiseConv2dParams& params);
cudaError_t launch_plane_strips(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_rolling_rows(const DepthwiseConv2dParams& params);
cudaError_t launch_rolling_rows(const DepthwiseConv2dParams& params, cudaStream_t stream);

bool covers_toeplitz(const DepthwiseConv2dParams& params);
cudaError_t launch_toeplitz(const DepthwiseConv2dParams& params, cudaStream_t stream);

// Covers everything.
cudaError_t launch_general(const DepthwiseConv2dParams& params, cudaStream_t stream);

// The launch choice.
struct Choice {
  const char* family;
  cudaError_t (*launch)(const DepthwiseConv2dParams&, cudaStream_t);
  bool reverses_taps;  // where reversed_taps asks for it; other families do not look at that
};
Choice choose_forward(const DepthwiseConv2dParams& params);

}  // namespace dwswap
