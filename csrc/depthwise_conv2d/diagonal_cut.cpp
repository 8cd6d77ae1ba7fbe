#include "depthwise_conv2d/diagonal_cut.h"

#include <algorithm>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/problem_key.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace diagonal {
namespace {

// Blocks that a multiprocessor has at once.
int resident_blocks(const Cut& cut, int kernel, int stride, const Device& device) {
  constexpr int kBlockBytes = 1024;  // of shared memory that the system takes
  const int bytes = cut.shared_bytes(kernel, stride);
  if (bytes > device.shared_per_block ||
      tile_columns(cut.columns, kernel, stride) > kMostBoxElements)
    return 0;
  return std::min(kMostTeams / cut.teams, device.shared_per_multiprocessor / (bytes + kBlockBytes));
}

// No parts: a block of it does not fit.
Cut make_cut(int teams, int64_t strips, const DepthwiseConv2dParams& p, const Device& device) {
  const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  const int pixels = teams * team_pixels(kernel);
  Cut cut{};
  cut.teams = teams;
  cut.columns = static_cast<int>(ceil_div(p.out_w, ceil_div(p.out_w, pixels)));
  const int64_t images = cut.columns == p.out_w ? pixels / cut.columns : 1;
  cut.images = static_cast<int>(std::clamp<int64_t>(images, 1, p.batch));
  cut.rows = static_cast<int>(ceil_div(p.out_h, strips));
  cut.stages =
      static_cast<int>(ceil_div((cut.rows - 1) * stride + kernel, stage_rows(kernel, stride)));
  cut.chunks = static_cast<int>(ceil_div(p.channels, kUnitChannels));
  cut.units = static_cast<int>(ceil_div(p.out_w, cut.columns) * ceil_div(p.out_h, cut.rows) *
                               ceil_div(p.batch, cut.images));
  // Blocks that run at once, with as many units each as any other, where there are so many.
  const int slots = device.multiprocessors * resident_blocks(cut, kernel, stride, device);
  if (slots == 0) return cut;
  const int most_parts = std::clamp(slots / cut.chunks, 1, cut.units);
  const int64_t turns = ceil_div(cut.units, most_parts);
  cut.parts = static_cast<int>(ceil_div(cut.units, turns));
  return cut;
}

// Of a launch but for its start, in us: of the stages that a block has one after another, each as
// long as the slowest of what it takes, and a little of what it reads and writes. The constants fit
// 1000 times of 134 of torchvision's shapes on an H200 (benchmarks/NOTES.md).
double expected_us(const Cut& cut, const DepthwiseConv2dParams& p, const Device& device) {
  constexpr double kStage = 2.0, kProducts = 970.0, kBytes = 3.7e6;  // the latter two per us
  constexpr double kNotHidden = 0.1;                                 // of reading and writing
  const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  const int64_t blocks = int64_t{cut.chunks} * cut.parts;
  const int products = kGroups * cut.teams * products_of_warp(kernel) * kernel *
                       static_cast<int>(ceil_div(kernel, 2)) * ring_rows(kernel, stride);
  const int pixels = stage_rows(kernel, stride) * tile_columns(cut.columns, kernel, stride) +
                     ring_rows(kernel, stride) * cut.columns;
  const auto blocks_of_multiprocessor =
      static_cast<double>(ceil_div(blocks, device.multiprocessors));
  const double bytes = static_cast<double>(blocks * cut.images) * pixels * kPixelBytes;
  const double stage =
      std::max({kStage, blocks_of_multiprocessor * products / kProducts, bytes / kBytes}) +
      kNotHidden * bytes / kBytes;
  return static_cast<double>(ceil_div(cut.units, cut.parts) * cut.stages) * stage;
}

// Warps keep their taps for whole images or strips of them, whose borders are read twice.
Cut search_cut(const DepthwiseConv2dParams& p, const Device& device) {
  constexpr int64_t kMostStrips = 16;
  // Rows below two kernels' are mostly border.
  const int64_t most = std::clamp<int64_t>(p.out_h * p.stride_h / (2 * p.kernel_h), 1, kMostStrips);
  Search<Cut> search;
  for (int teams = 1; teams <= kMostTeams; ++teams) {
    for (int64_t strips = 1; strips <= most; ++strips) {
      const Cut cut = make_cut(teams, strips, p, device);
      if (cut.parts > 0) search.consider(expected_us(cut, p, device), cut);
    }
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, const Device& device) {
  return memoized(problem_key(p, device), [&] { return search_cut(p, device); });
}

}  // namespace diagonal
}  // namespace dwswap
