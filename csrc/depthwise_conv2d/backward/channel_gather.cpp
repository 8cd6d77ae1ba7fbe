#include <limits>

#include "common/data_type.h"
#include "depthwise_conv2d/backward/gather.h"

namespace dwswap {

bool covers_channel_gather(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  if (!p.channels_last() || !gathers_squares(p)) return false;
  // Rows and columns, with what a thread runs over, offsets within a row, and indices of threads.
  constexpr int64_t kOver = 16;
  return p.in_h + p.padding_h <= kLimit - kOver &&
         p.channels * (p.in_w + p.padding_w + kOver) <= kLimit &&
         p.batch * p.channels * pairs_of(p.in_h, p.padding_h) * pairs_of(p.in_w, p.padding_w) <=
             kLimit;
}

cudaError_t launch_channel_gather(const GradientParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype,
                         [&]<typename T>() { return channel_gather::launch_typed<T>(p, stream); });
}

}  // namespace dwswap
