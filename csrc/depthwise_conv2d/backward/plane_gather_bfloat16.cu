#include "depthwise_conv2d/backward/plane_gather.cuh"

namespace dwswap::plane_gather {
template cudaError_t launch_typed<__nv_bfloat16>(const GradientParams&, cudaStream_t);
}
