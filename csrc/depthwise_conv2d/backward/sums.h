// Gradients of weight and bias are sums over all images and pixels. To be the same bit for bit in
// every run, they are added in a fixed order: blocks of threads sum up shares of the pixels, and
// where there is more than one share, a second kernel adds up the sums of the shares.
#pragma once

#include "depthwise_conv2d/backward/params.h"

namespace dwswap {

// The sums of a channel: one per tap, and that of grad_output, which is the gradient of the bias.
inline int64_t values_of(const GradientParams& p) { return p.taps() + 1; }

// The compiled problems of the fast families: stride 1, with any dilation, and 2, and 3 x 3, 5 x 5
// or 7 x 7 taps. They would read the input for the bias alone, too. With more padding a row of
// grad_output could see none of the input, and would not be visited.
inline bool sums_squares(const GradientParams& p) {
  if (p.dtype == DataType::kFloat64 || !p.wants_weight) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.stride_h == 2 && p.is_dilated()) return false;
  if (p.kernel_h != p.kernel_w || p.padding_h > p.dilation_h * (p.kernel_h - 1)) return false;
  return p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7;
}

// Bytes of the sums of the shares, in the type of the accumulator; none for a single share, whose
// sums are the gradients.
inline int64_t sums_bytes(const GradientParams& p, int64_t shares) {
  const int64_t bytes = p.dtype == DataType::kFloat64 ? 8 : 4;
  return shares == 1 ? 0 : shares * p.out_channels() * values_of(p) * bytes;
}

// The status of the launch that sums up the shares; behind it, where there are several, launches
// the kernel that adds them up. p.workspace holds [share][value][channel].
cudaError_t finish_launch(const GradientParams& p, int64_t shares, cudaStream_t stream);

}  // namespace dwswap
