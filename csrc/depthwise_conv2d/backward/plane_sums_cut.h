// How plane_sums cuts a problem into threads and blocks.
#pragma once

#include "depthwise_conv2d/backward/split.h"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace plane_sums {

constexpr int kThreads = 128;  // of a block

// Blocks of a multiprocessor: the sums of a thread take its registers.
constexpr int resident_blocks(int64_t kernel) { return kernel == 3 ? 6 : kernel == 5 ? 4 : 3; }

Split choose_cut(const GradientParams& params, int multiprocessors);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const GradientParams& params, const Split& cut, cudaStream_t stream);

}  // namespace plane_sums
}  // namespace dwswap
