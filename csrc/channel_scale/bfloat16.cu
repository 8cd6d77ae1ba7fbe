#include "channel_scale/kernel.cuh"

namespace dwswap::channel_scale {
template cudaError_t launch_scale<__nv_bfloat16>(const ChannelScaleParams&, cudaStream_t);
template cudaError_t launch_sums<__nv_bfloat16>(const ChannelScaleParams&, const Cut&,
                                                cudaStream_t);
}  // namespace dwswap::channel_scale
