#include "separable_conv2d/kernel.cuh"

namespace dwswap::separable {
template cudaError_t launch_typed<__half>(const SeparableConv2dParams&, const Device&,
                                          cudaStream_t);
}
