#include <algorithm>
#include <limits>

#include "common/alignment.h"
#include "common/data_type.h"
#include "depthwise_conv2d/plane_strips_cut.h"

namespace dwswap {

bool covers_plane_strips(const DepthwiseConv2dParams& p) {
  // A kernel and the stages may reach past the end.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - 16;
  if (p.dtype == DataType::kFloat64 || p.multiplier != 1) return false;
  if (p.in_layout != Layout::kContiguous || p.out_layout != Layout::kContiguous) return false;
  if (p.stride_h != p.stride_w || p.is_dilated()) return false;
  if (!aligned_to(kVectorBytes, 0, {p.input, p.output})) return false;
  if (p.channels * p.in_h * p.in_w > kLimit || p.channels * p.out_h * p.out_w > kLimit)
    return false;
  if (p.batch * p.channels * p.out_h > kLimit) return false;
  if (p.padding_w > p.kernel_w / 2 || p.padding_h > p.kernel_h / 2) return false;
  // A row of output and the rows that it sees fit a stage.
  const int64_t element_bytes = bytes_of(p.dtype);
  if (std::max(std::min(p.kernel_h, p.in_h) * p.in_w, p.out_w) * element_bytes >
      plane_strips::kStageBytes)
    return false;
  return plane_strips::is_compiled(p);
}

cudaError_t launch_plane_strips(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  const bool bulk = uses_bulk_copies(device);
  return visit_fast_type(p.dtype, [&]<typename T>() {
    using namespace plane_strips;
    const Cut cut = choose_cut(p, sizeof(T), device);
    if (cut.rows == 0) return cudaErrorInvalidValue;
    const auto launch = [&]<Threads THREADS>() {
      return has_many_taps(p.kernel_h, p.kernel_w)
                 ? launch_cut<T, THREADS, true>(p, cut, device, bulk, stream)
                 : launch_cut<T, THREADS, false>(p, cut, device, bulk, stream);
    };
    switch (threads_of(cut.columns)) {
      case Threads::kNarrow:
        return launch.template operator()<Threads::kNarrow>();
      case Threads::kWide:
        return launch.template operator()<Threads::kWide>();
      case Threads::kPaired:
        if constexpr (sizeof(T) == 2)
          return launch_cut<T, Threads::kPaired, false>(p, cut, device, bulk, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace dwswap
