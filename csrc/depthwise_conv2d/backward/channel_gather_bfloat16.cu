#include "depthwise_conv2d/backward/channel_gather.cuh"

namespace dwswap::channel_gather {
template cudaError_t launch_typed<__nv_bfloat16>(const GradientParams&, cudaStream_t);
}
