// What pixel_sums covers, and has compiled by a file per element type.
#pragma once

#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace pixel_sums {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 8;  // threads side by side: 32 bytes, which memory delivers at once
constexpr int kMaxRows = kMaxThreads / kLanes;
// Additions of a thread. With a tree over the rows behind them, chains that short round less than
// PyTorch's own sums may: float32 needs no compensated ones.
constexpr int kMostChain = 32;
constexpr int64_t kMostPixels = kMostChain * kMaxRows;  // of grad_output, of all images

template <typename T>
cudaError_t launch_typed(const GradientParams& params, cudaStream_t stream);

}  // namespace pixel_sums
}  // namespace dwswap
