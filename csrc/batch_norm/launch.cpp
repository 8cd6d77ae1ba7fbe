// Which problems have kernels, and the choice of their element type.
#include "batch_norm/launch.h"

#include <algorithm>

#include "batch_norm/cut.h"
#include "batch_norm/params.h"
#include "common/device.h"

namespace dwswap {
namespace {

cudaError_t launch(const BatchNormParams& p, bool backward, cudaStream_t stream) {
  const batch_norm::Cut cut = batch_norm::choose_cut(p, current_device().multiprocessors);
  return visit_fast_type(
      p.dtype, [&]<typename T>() { return batch_norm::launch_typed<T>(p, cut, backward, stream); });
}

}  // namespace

bool covers_batch_norm(const BatchNormParams& p) {
  const int64_t values = int64_t{p.batch} * p.pixels;
  return p.dtype != DataType::kFloat64 && p.channels > 0 && values > 1 &&
         std::max<int64_t>(values, p.channels) <= batch_norm::kMostPositions;
}

int64_t batch_norm_partials(const BatchNormParams& p) {
  const batch_norm::Cut cut = batch_norm::choose_cut(p, current_device().multiprocessors);
  return 2 * int64_t{cut.splits} * cut.columns;
}

cudaError_t launch_batch_norm(const BatchNormParams& p, cudaStream_t stream) {
  return launch(p, false, stream);
}

cudaError_t launch_batch_norm_backward(const BatchNormParams& p, cudaStream_t stream) {
  return launch(p, true, stream);
}

}  // namespace dwswap
