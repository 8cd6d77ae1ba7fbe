#include "depthwise_conv2d/toeplitz_cut.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/problem_key.h"

namespace dwswap {
namespace toeplitz {

int choose_steps(const DepthwiseConv2dParams& p) {
  const int64_t columns = lead_of(p.padding_w) - p.padding_w + (kTile - 1) * p.stride_w +
                          (p.kernel_w - 1) * p.dilation_w + 1;
  const int64_t steps = ceil_div(columns, kStep);
  const int64_t least = p.stride_w;  // a stride of 2 has kernels of 2 steps and more
  return steps > 3 ? 0 : static_cast<int>(std::max(steps, least));
}

int Cut::group_elements(int stride) const {
  const int row = row_elements(input_columns(steps, stride, tiles));
  const int groups = channels / kGroup;
  // In words, modulo the 32 banks: the lanes of a warp take as many groups.
  const int wanted = groups == 1 ? 0 : 32 / groups;
  int words = images * in_rows * row / 2;
  while (words % 32 != wanted) words += 4;
  return 2 * words;
}

int64_t Cut::shared_bytes(int stride, int64_t kernel_h) const {
  return static_cast<int64_t>(channels / kGroup) * group_elements(stride) * 2 +
         4 * channels * kernel_h * band_words(steps, stride);
}

Columns choose_columns(const DepthwiseConv2dParams& p, const Cut& cut) {
  const int all = input_columns(cut.steps, static_cast<int>(p.stride_w), cut.tiles);
  const auto lead = static_cast<int>(lead_of(p.padding_w));
  const int64_t width = ceil_div(p.in_w, 2) * 2;
  const bool whole = p.out_w <= cut.tiles * kTile && p.out_w <= p.in_w && lead + width <= all;
  if (!whole) return {lead, 0, all, 0, false};
  return {lead, lead, static_cast<int>(width), lead, true};
}

namespace {

Cut search_cut(const DepthwiseConv2dParams& p, const Device& device) {
  constexpr int kMostRows = 40, kMostImages = 4;
  constexpr double kWarp = 32.0, kResidentThreads = 512.0, kBusyWarps = 20.0;
  constexpr double kBlockBytes = 1024.0, kSector = 32.0;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  const bool channels_last = p.in_layout == Layout::kChannelsLast;
  const int steps = choose_steps(p);
  const auto stride = static_cast<int>(p.stride_w);
  const int64_t reach = (p.kernel_h - 1) * p.dilation_h + 1;
  Search<Cut> search;
  // Instructions of a thread for an element that it copies, about; fewer where rows are aligned.
  const auto per_element = [&](int64_t width, bool whole_planes) {
    if (channels_last) return 4.0;
    if (width % 4 == 0) return 6.0;
    if (width % 2 == 0) return whole_planes ? 5.0 : 11.0;
    return whole_planes ? 9.0 : 22.0;
  };
  const auto consider = [&](int tiles, int channels, int images, int rows, int threads) {
    Cut cut{steps, tiles, channels, images, rows};
    cut.in_rows = static_cast<int>((rows - 1) * p.stride_h + reach);
    cut.threads = threads;
    const int64_t shared = cut.shared_bytes(stride, p.kernel_h);
    const Columns columns = choose_columns(p, cut);
    if (shared > device.shared_per_block) return;
    if (channels_last && channels / kGroup * columns.count / 2 > threads) return;
    if (images * p.channels * p.in_h * p.in_w > kLimit && images > 1) return;
    const auto strips = ceil_div(p.out_h, rows);
    const double units = static_cast<double>(ceil_div(p.out_w, tiles * kTile)) * strips *
                         ceil_div(p.batch, images) * ceil_div(p.channels, channels);
    const double products = units * channels * ceil_div(images * rows, kTileRows) * kWarp *
                            (25.0 + 24.0 * tiles + p.kernel_h * (5.0 + 3.0 * tiles * steps));
    const double loaded = units * channels * images * cut.in_rows * columns.count;
    const double stored = units * channels * images * rows * std::min<int64_t>(p.out_w, tiles * 8);
    const bool whole = columns.whole && strips == 1;
    const double instructions =
        products + loaded * per_element(p.in_w, whole) + stored * per_element(p.out_w, whole);
    const double warps = std::floor(std::min(kResidentThreads / threads,
                                             static_cast<double>(device.shared_per_multiprocessor) /
                                                 (static_cast<double>(shared) + kBlockBytes))) *
                         threads / kWarp;
    // Few warps wait for memory with nothing to do meanwhile.
    const double waiting = std::max(1.0, kBusyWarps / warps);
    // All the blocks have as many units, but the last ones.
    const double share = units * threads / kWarp / (warps * device.multiprocessors);
    const double idle = std::ceil(share) / share;
    // Runs of few channels leave sectors of memory half used.
    const double run = channels * 2.0;
    const double sectors = channels_last ? 1.0 + kSector / 2.0 / run : 1.0;
    search.consider(instructions * waiting * idle * sectors, cut);
  };
  for (const int tiles : {1, 2, 4, 7}) {
    bool compiled = false;
#define DWSWAP_CASE(STEPS, STRIDE, TILES) \
  compiled |= steps == STEPS && stride == STRIDE && tiles == TILES;
    DWSWAP_TOEPLITZ_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
    if (!compiled) continue;
    for (int channels = kGroup; channels <= 64; channels *= 2) {
      if (channels > p.channels && channels > kGroup) continue;
      for (const int threads : {128, 256}) {
        for (int64_t strips = ceil_div(p.out_h, kMostRows);
             strips <= std::min<int64_t>(p.out_h, ceil_div(p.out_h, kMostRows) + 3); ++strips) {
          const auto rows = static_cast<int>(ceil_div(p.out_h, strips));
          const int images = strips == 1 ? kMostImages : 1;
          for (int i = 1; i <= images && i <= p.batch; ++i)
            consider(tiles, channels, i, rows, threads);
        }
        consider(tiles, channels, 1, 1, threads);
      }
    }
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, const Device& device) {
  return memoized(problem_key(p, device), [&] { return search_cut(p, device); });
}

}  // namespace toeplitz
}  // namespace dwswap
