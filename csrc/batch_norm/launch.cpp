// Which problems have kernels, and the choice of their element type.
#include "batch_norm/launch.h"

#include <algorithm>

namespace dwswap {

bool covers_batch_norm(const BatchNormParams& p) {
  const int64_t values = int64_t{p.batch} * p.pixels;
  return p.dtype != DataType::kFloat64 && p.channels > 0 && values > 1 &&
         std::max<int64_t>(values, p.channels) <= batch_norm::kMostPositions;
}

cudaError_t launch_batch_norm(const BatchNormParams& p, const batch_norm::Cut& cut, bool backward,
                              cudaStream_t stream) {
  return visit_fast_type(
      p.dtype, [&]<typename T>() { return batch_norm::launch_typed<T>(p, cut, backward, stream); });
}

}  // namespace dwswap
