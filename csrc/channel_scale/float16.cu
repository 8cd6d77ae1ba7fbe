#include "channel_scale/kernel.cuh"

namespace dwswap::channel_scale {
template cudaError_t launch_scale<__half>(const ChannelScaleParams&, cudaStream_t);
template cudaError_t launch_sums<__half>(const ChannelScaleParams&, const Cut&, cudaStream_t);
}  // namespace dwswap::channel_scale
