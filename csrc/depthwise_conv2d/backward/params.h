// What every kernel of the gradients gets.
#pragma once

#include "depthwise_conv2d/params.h"

namespace dwswap {

// Of y = conv(input, weight) + bias; in_* describe the input and its gradient, out_* grad_output.
// All images are dense, in one layout. What is not wanted is null.
struct GradientParams : DepthwiseConv2dParams {
  const void* grad_output;
  void* grad_input;
  void* grad_weight;  // as weight
  void* grad_bias;    // (channels * multiplier)
  bool wants_weight, wants_bias;
  void* workspace;  // as many bytes as the family asked for, at a multiple of 16

  constexpr int64_t taps() const { return kernel_h * kernel_w; }
  constexpr bool channels_last() const { return in_layout == Layout::kChannelsLast; }
};

// The launch choice. Both launches are on `stream` of the current device, and return its status.
struct GradientChoice {
  const char* family;
  int64_t (*workspace_bytes)(const GradientParams&);
  cudaError_t (*launch)(const GradientParams&, cudaStream_t);
};
GradientChoice choose_input_gradient(const GradientParams& params);
GradientChoice choose_weight_gradient(const GradientParams& params);

// --- gradients of the input

// The convolution of grad_output with the flipped weight, by a forward family.
bool covers_flipped(const GradientParams& params);
int64_t flipped_workspace_bytes(const GradientParams& params);
cudaError_t launch_flipped(const GradientParams& params, cudaStream_t stream);
// That convolution, of a problem that it covers.
DepthwiseConv2dParams flipped_convolution(const GradientParams& params);

bool covers_channel_gather(const GradientParams& params);
cudaError_t launch_channel_gather(const GradientParams& params, cudaStream_t stream);

bool covers_plane_gather(const GradientParams& params);
cudaError_t launch_plane_gather(const GradientParams& params, cudaStream_t stream);

// Covers everything.
cudaError_t launch_general_gather(const GradientParams& params, cudaStream_t stream);

// --- gradients of weight and bias: see sums.cuh

bool covers_diagonal_sums(const GradientParams& params);
int64_t diagonal_sums_workspace_bytes(const GradientParams& params);
cudaError_t launch_diagonal_sums(const GradientParams& params, cudaStream_t stream);

bool covers_column_sums(const GradientParams& params);
int64_t column_sums_workspace_bytes(const GradientParams& params);
cudaError_t launch_column_sums(const GradientParams& params, cudaStream_t stream);

bool covers_channel_sums(const GradientParams& params);
int64_t channel_sums_workspace_bytes(const GradientParams& params);
cudaError_t launch_channel_sums(const GradientParams& params, cudaStream_t stream);

bool covers_gram_sums(const GradientParams& params);
bool suits_gram_sums(const GradientParams& params);
int64_t gram_sums_workspace_bytes(const GradientParams& params);
cudaError_t launch_gram_sums(const GradientParams& params, cudaStream_t stream);

bool covers_plane_sums(const GradientParams& params);
int64_t plane_sums_workspace_bytes(const GradientParams& params);
cudaError_t launch_plane_sums(const GradientParams& params, cudaStream_t stream);

bool covers_pixel_sums(const GradientParams& params);
bool suits_pixel_sums(const GradientParams& params);
cudaError_t launch_pixel_sums(const GradientParams& params, cudaStream_t stream);

// Covers everything.
int64_t general_sums_workspace_bytes(const GradientParams& params);
cudaError_t launch_general_sums(const GradientParams& params, cudaStream_t stream);

}  // namespace dwswap
