#include "depthwise_conv2d/backward/plane_sums.cuh"

namespace dwswap::plane_sums {
template cudaError_t launch_typed<__half>(const GradientParams&, const Split&, cudaStream_t);
}
