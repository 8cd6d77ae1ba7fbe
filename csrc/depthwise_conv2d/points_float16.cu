#include "depthwise_conv2d/points.cuh"

namespace dwswap::points {
template cudaError_t launch_typed<__half>(const DepthwiseConv2dParams&, cudaStream_t);
}
