#include "depthwise_conv2d/plane_strips.cuh"

namespace dwswap::plane_strips {
template cudaError_t launch_typed<__nv_bfloat16>(const DepthwiseConv2dParams&, cudaStream_t);
}
