#include "depthwise_conv2d/backward/plane_gather.cuh"

namespace dwswap::plane_gather {
template cudaError_t launch_typed<__half>(const GradientParams&, cudaStream_t);
}
