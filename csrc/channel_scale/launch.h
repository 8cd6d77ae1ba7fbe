// Which problems have kernels, and their launch.
#pragma once

#include "channel_scale/cut.h"
#include "channel_scale/params.h"

namespace dwswap {

// Whether there are kernels for such images.
bool covers_channel_scale(const ChannelScaleParams& params);
// y, on `stream` of the current device; the CUDA status of the launch.
cudaError_t launch_channel_scale(const ChannelScaleParams& params, cudaStream_t stream);
// The gradients of the gates, cut as sums_cut() says; partials where it has several splits.
cudaError_t launch_gate_gradients(const ChannelScaleParams& params, const channel_scale::Cut& cut,
                                  cudaStream_t stream);

namespace channel_scale {

// What kernel.cuh has for an element type.
template <typename T>
cudaError_t launch_scale(const ChannelScaleParams& params, cudaStream_t stream);
template <typename T>
cudaError_t launch_sums(const ChannelScaleParams& params, const Cut& cut, cudaStream_t stream);

}  // namespace channel_scale
}  // namespace dwswap
