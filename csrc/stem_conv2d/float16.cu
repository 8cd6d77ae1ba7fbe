#include "stem_conv2d/kernel.cuh"

namespace dwswap::stem {
template cudaError_t launch_typed<__half>(const StemConv2dParams&, const Device&, cudaStream_t);
}
