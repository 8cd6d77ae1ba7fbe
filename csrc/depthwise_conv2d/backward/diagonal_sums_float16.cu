#include "depthwise_conv2d/backward/diagonal_sums.cuh"

namespace dwswap::diagonal_sums {
template cudaError_t launch_typed<__half>(const GradientParams&, const Device&, cudaStream_t);
}
