#include "batch_norm/kernel.cuh"

namespace dwswap::batch_norm {
template cudaError_t launch_typed<__nv_bfloat16>(const BatchNormParams&, const Cut&, bool,
                                                 cudaStream_t);
}
