#include "depthwise_conv2d/backward/channel_sums.cuh"

namespace dwswap::channel_sums {
template cudaError_t launch_typed<__nv_bfloat16>(const GradientParams&, const Cut&, cudaStream_t);
}
