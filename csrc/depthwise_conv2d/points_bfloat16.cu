#include "depthwise_conv2d/points.cuh"

namespace dwswap::points {
template cudaError_t launch_typed<__nv_bfloat16>(const DepthwiseConv2dParams&, cudaStream_t);
}
