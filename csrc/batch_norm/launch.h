// Which problems have kernels, and their launch.
#pragma once

#include "batch_norm/cut.h"
#include "batch_norm/params.h"

namespace dwswap {

// Whether there are kernels for such images.
bool covers_batch_norm(const BatchNormParams& params);
// Cut as choose_cut() says, on `stream` of the current device; the CUDA status of the launches.
cudaError_t launch_batch_norm(const BatchNormParams& params, const batch_norm::Cut& cut,
                              bool backward, cudaStream_t stream);

namespace batch_norm {

// What kernel.cuh has for an element type.
template <typename T>
cudaError_t launch_typed(const BatchNormParams& params, const Cut& cut, bool backward,
                         cudaStream_t stream);

}  // namespace batch_norm
}  // namespace dwswap
