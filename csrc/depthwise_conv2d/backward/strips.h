// What column_sums and diagonal_sums ask of a problem.
#pragma once

#include <limits>

#include "common/alignment.h"
#include "depthwise_conv2d/backward/sums.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {

// Whether the copy engine reads both images (channels_last) strip by strip: it wants addresses and
// pixels of 16 bytes. Strips and rows are counted in 32 bits.
inline bool reads_strips(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  constexpr uint64_t kCopyEngineBytes = 16;
  if (!p.channels_last() || !sums_squares(p) || p.multiplier != 1 || p.is_dilated()) return false;
  return reads_boxes(current_device()) &&
         aligned_to(kCopyEngineBytes, p.channels * bytes_of(p.dtype), {p.grad_output, p.input}) &&
         p.batch * p.out_h * p.out_w <= kLimit && p.in_h + 2 * p.padding_h <= kLimit &&
         p.in_w + 2 * p.padding_w <= kLimit && p.channels <= kLimit;
}

}  // namespace dwswap
