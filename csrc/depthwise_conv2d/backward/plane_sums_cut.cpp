#include "depthwise_conv2d/backward/plane_sums_cut.h"

#include "common/integer.h"

namespace dwswap {
namespace plane_sums {

Split choose_cut(const GradientParams& p, int multiprocessors) {
  Walks walks{};
  walks.columns = p.batch * p.dilation_h * p.out_w;
  walks.height = ceil_div(p.out_h, p.dilation_h);
  walks.more_rows = (p.kernel_h - 1) / p.stride_h;
  walks.walkers = kThreads;
  walks.blocks = p.out_channels();
  walks.resident = static_cast<int64_t>(resident_blocks(p.kernel_h)) * multiprocessors;
  walks.reduction = 20;
  walks.enough_blocks = p.dtype == DataType::kFloat32 ? 80 : 100;
  return choose_split(walks);
}

}  // namespace plane_sums
}  // namespace dwswap
