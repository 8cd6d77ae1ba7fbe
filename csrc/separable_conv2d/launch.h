// What kernel.cuh has for an element type.
#pragma once

#include "common/device.h"
#include "separable_conv2d/params.h"

namespace dwswap {
namespace separable {

template <typename T>
cudaError_t launch_typed(const SeparableConv2dParams& params, const Device& device,
                         cudaStream_t stream);

}  // namespace separable
}  // namespace dwswap
