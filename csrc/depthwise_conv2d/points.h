// What points has compiled, by a file per element type.
#pragma once

#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace points {

constexpr int kThreads = 128;  // of a block, at most
constexpr int kKernel = 3;

template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream);

}  // namespace points
}  // namespace dwswap
