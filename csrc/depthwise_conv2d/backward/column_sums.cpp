#include <limits>

#include "common/data_type.h"
#include "depthwise_conv2d/backward/column_sums_cut.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace {

int bytes_of(DataType dtype) { return is_half(dtype) ? 2 : 4; }

}  // namespace

bool covers_column_sums(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  constexpr uint64_t kCopyEngineBytes = 16;
  if (!p.channels_last() || !sums_squares(p) || p.multiplier != 1 || p.is_dilated()) return false;
  if (p.kernel_h != column_sums::kKernel || !reads_boxes(current_device())) return false;
  const uint64_t places = static_cast<uint64_t>(p.channels) * bytes_of(p.dtype) |
                          reinterpret_cast<uintptr_t>(p.grad_output) |
                          reinterpret_cast<uintptr_t>(p.input);
  // Strips and rows are counted in 32 bits.
  return places % kCopyEngineBytes == 0 && p.batch * p.out_h * p.out_w <= kLimit &&
         p.in_h + 2 * p.padding_h <= kLimit && p.in_w + 2 * p.padding_w <= kLimit &&
         p.channels <= kLimit;
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
