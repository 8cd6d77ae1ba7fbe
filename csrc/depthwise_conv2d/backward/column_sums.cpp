#include "common/data_type.h"
#include "depthwise_conv2d/backward/column_sums_cut.h"
#include "depthwise_conv2d/backward/strips.h"

namespace dwswap {

bool covers_column_sums(const GradientParams& p) {
  return p.kernel_h == column_sums::kKernel && reads_strips(p);
}

int64_t column_sums_workspace_bytes(const GradientParams& p) {
  const column_sums::Cut cut = column_sums::choose_cut(p, bytes_of(p.dtype), current_device());
  return sums_bytes(p, cut.shares);
}

cudaError_t launch_column_sums(const GradientParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_fast_type(
      p.dtype, [&]<typename T>() { return column_sums::launch_typed<T>(p, device, stream); });
}

}  // namespace dwswap
