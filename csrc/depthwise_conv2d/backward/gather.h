// What the gradients of the input of stride 2 have in common.
#pragma once

#include "depthwise_conv2d/backward/params.h"

namespace dwswap {

// The compiled problems: stride 2 and 3 x 3, 5 x 5 or 7 x 7 taps.
inline bool gathers_squares(const GradientParams& p) {
  if (p.dtype == DataType::kFloat64 || p.multiplier != 1) return false;
  if (p.stride_h != 2 || p.stride_w != 2 || p.is_dilated()) return false;
  return p.kernel_h == p.kernel_w && (p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7);
}

// Pairs of rows or columns that hold all of an axis; the first one begins at the even row of
// y + padding.
inline int64_t pairs_of(int64_t size, int64_t padding) {
  return (padding + size - 1) / 2 - padding / 2 + 1;
}

// Compiled by a file per element type each.
namespace channel_gather {
template <typename T>
cudaError_t launch_typed(const GradientParams& params, cudaStream_t stream);
}
namespace plane_gather {
constexpr int kPairs = 4;
template <typename T>
cudaError_t launch_typed(const GradientParams& params, cudaStream_t stream);
}  // namespace plane_gather

}  // namespace dwswap
