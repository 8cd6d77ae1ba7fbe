#include "depthwise_conv2d/tma_tiles.cuh"

namespace dwswap::tma_tiles {
template cudaError_t launch_typed<float>(const DepthwiseConv2dParams&, CUtensorMapDataType, int,
                                       cudaStream_t);
}
