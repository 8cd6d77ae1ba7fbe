#include "depthwise_conv2d/diagonal_cut.h"

#include <algorithm>

namespace dwswap {
namespace diagonal {

int resident_blocks(const Cut& cut, int kernel, int stride, const Device& device) {
  constexpr int kBlockBytes = 1024;  // of shared memory that the system takes
  return std::min(kMinBlocks, device.shared_per_multiprocessor /
                                  (cut.shared_bytes(kernel, stride) + kBlockBytes));
}

// Every warp has all its products, and keeps its taps for whole images: of all cuts the best or
// within a tenth of it, at 64 images of a network's layers. Smaller problems are cut into strips,
// whose borders are read twice, until all multiprocessors are busy.
Cut choose_cut(const DepthwiseConv2dParams& p, const Device& device) {
  const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  const int64_t all = ceil_div(p.out_w, kSegment);
  const int64_t tiles = ceil_div(all, segments_of_warp(kernel));
  Cut cut{};
  cut.segments = static_cast<int>(ceil_div(all, tiles));
  const int64_t images = tiles == 1 ? segments_of_warp(kernel) / cut.segments : 1;
  cut.images = static_cast<int>(std::clamp<int64_t>(images, 1, p.batch));
  const int64_t slots =
      static_cast<int64_t>(device.multiprocessors) * resident_blocks(cut, kernel, stride, device);
  const int64_t units = ceil_div(p.channels, kUnitChannels) * ceil_div(p.batch, cut.images) * tiles;
  // Rows below three kernels' are mostly border.
  const int64_t most = std::max<int64_t>(1, p.out_h * stride / (3 * kernel));
  const int64_t strips = std::clamp<int64_t>(slots / units, 1, most);
  cut.rows = static_cast<int>(ceil_div(p.out_h, strips));
  return cut;
}

}  // namespace diagonal
}  // namespace dwswap
