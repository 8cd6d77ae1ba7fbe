// How rolling_rows cuts a problem into threads.
#pragma once

#include "common/depth.h"
#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace rolling_rows {

constexpr int kThreads = 128;

template <typename T_, int K_, int STRIDE_, Depth DEPTH_, bool DILATED_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = K_;
  static constexpr bool kDilated = DILATED_;
  static constexpr int kStride = STRIDE_;
  // Of output, per thread: as many as registers allow all their inputs at once.
  static constexpr int kRows = DEPTH_ == Depth::kFlat ? 1
                               : K_ == 3              ? 8 / STRIDE_
                               : K_ == 5              ? 4
                                                      : 4 / STRIDE_;
  static constexpr int kInputRows = (kRows - 1) * STRIDE_ + K_;
  static constexpr int kMinBlocks = K_ == 7 ? 2 : K_ == 5 && DILATED_ && kRows > 1 ? 3 : 4;
};

// Threads that share a column of output.
inline int64_t strips_of(const DepthwiseConv2dParams& p, int rows) {
  const int64_t row_step = rows == 1 ? 1 : p.dilation_h;
  return ceil_div(p.out_h, rows * row_step) * row_step;
}

Depth choose_depth(const DepthwiseConv2dParams& params);

// Calls visit.operator()<Traits>() for the compiled size of the problem. False: there is none.
template <typename T, typename Visit>
bool visit(const DepthwiseConv2dParams& p, Visit&& visit) {
  const Depth depth = choose_depth(p);
  const bool dilated = p.is_dilated();
#define DWSWAP_CASE(K, S)                                                \
  if (p.kernel_h == K && p.kernel_w == K && p.stride_h == S) {           \
    if (depth == Depth::kFlat) {                                         \
      visit.template operator()<Traits<T, K, S, Depth::kFlat, true>>();  \
    } else if (!dilated) {                                               \
      visit.template operator()<Traits<T, K, S, Depth::kDeep, false>>(); \
    } else if constexpr (S == 1) {                                       \
      visit.template operator()<Traits<T, K, S, Depth::kDeep, true>>();  \
    }                                                                    \
    return true;                                                         \
  }
  DWSWAP_CASE(3, 1)
  DWSWAP_CASE(3, 2)
  DWSWAP_CASE(5, 1)
  DWSWAP_CASE(5, 2)
  DWSWAP_CASE(7, 1)
  DWSWAP_CASE(7, 2)
#undef DWSWAP_CASE
  return false;
}

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream);

}  // namespace rolling_rows
}  // namespace dwswap
