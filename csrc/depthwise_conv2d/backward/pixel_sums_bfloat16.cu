#include "depthwise_conv2d/backward/pixel_sums.cuh"

namespace dwswap::pixel_sums {
template cudaError_t launch_typed<__nv_bfloat16>(const GradientParams&, cudaStream_t);
}
