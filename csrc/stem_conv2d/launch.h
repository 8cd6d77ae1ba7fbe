// What kernel.cuh has for an element type of half precision, and float32.cu.
#pragma once

#include "common/device.h"
#include "stem_conv2d/params.h"

namespace dwswap {
namespace stem {

template <typename T>
cudaError_t launch_typed(const StemConv2dParams& params, const Device& device, cudaStream_t stream);

}  // namespace stem
}  // namespace dwswap
