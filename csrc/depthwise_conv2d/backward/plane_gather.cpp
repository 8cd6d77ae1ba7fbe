#include <limits>

#include "common/data_type.h"
#include "common/integer.h"
#include "depthwise_conv2d/backward/gather.h"

namespace dwswap {

bool covers_plane_gather(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  if (p.channels_last() || !gathers_squares(p)) return false;
  // Offsets within a plane, with the rows that a thread runs over, and indices of threads.
  const int64_t rows = 2 * plane_gather::kPairs + p.kernel_h + p.padding_h;
  return (p.in_h + rows) * (p.in_w + p.padding_w) <= kLimit &&
         p.batch * p.channels * ceil_div(pairs_of(p.in_h, p.padding_h), plane_gather::kPairs) *
                 p.in_w <=
             kLimit;
}

cudaError_t launch_plane_gather(const GradientParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype,
                         [&]<typename T>() { return plane_gather::launch_typed<T>(p, stream); });
}

}  // namespace dwswap
