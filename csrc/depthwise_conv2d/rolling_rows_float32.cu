#include "depthwise_conv2d/rolling_rows.cuh"

namespace dwswap::rolling_rows {
template cudaError_t launch_typed<float>(const DepthwiseConv2dParams&, cudaStream_t);
}
