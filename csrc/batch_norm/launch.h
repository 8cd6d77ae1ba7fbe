// What kernel.cuh has for an element type.
#pragma once

#include "batch_norm/cut.h"
#include "batch_norm/params.h"

namespace dwswap {
namespace batch_norm {

template <typename T>
cudaError_t launch_typed(const BatchNormParams& params, const Cut& cut, bool backward,
                         cudaStream_t stream);

}  // namespace batch_norm
}  // namespace dwswap
