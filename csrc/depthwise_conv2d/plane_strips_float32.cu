#include "depthwise_conv2d/plane_strips.cuh"

namespace dwswap::plane_strips {
template cudaError_t launch_typed<float>(const DepthwiseConv2dParams&, cudaStream_t);
}
