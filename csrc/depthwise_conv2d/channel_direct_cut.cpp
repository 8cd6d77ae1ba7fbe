#include "depthwise_conv2d/channel_direct_cut.h"

#include <cstdint>
#include <limits>

#include "common/alignment.h"

namespace dwswap {
namespace channel_direct {
namespace {

// Channels that one access of every tensor can hold.
int aligned_channels(const DepthwiseConv2dParams& p, int element_bytes) {
  const auto fits = [&](int channels) {
    return aligned_to(channels * element_bytes, p.channels * element_bytes,
                      {p.input, p.weight, p.bias, p.input_bias, p.output});
  };
  int channels = kMostChannels;
  while (channels > 1 && !fits(channels)) channels /= 2;
  return channels;
}

// Of two float32 channels with stride 2: what their 80 and 117 registers leave room for.
int64_t resident_blocks(int columns) { return columns == 2 ? 6 : 4; }

// The rows that strips of at most `most` have, as even as they can be.
int even_rows(int64_t out_h, int most) {
  return static_cast<int>(ceil_div(out_h, ceil_div(out_h, most)));
}

// As long strips, of `most` rows at most, as keep the multiprocessors busy.
Cut cut_by_threads(const DepthwiseConv2dParams& p, int channels, int columns, int most,
                   int multiprocessors) {
  constexpr int64_t kBusyThreads = 384;  // of a multiprocessor
  Cut cut{channels, columns, 0};
  for (;; most /= 2) {
    cut.rows = even_rows(p.out_h, most);
    if (most == 1 || cut.threads(p) >= kBusyThreads * multiprocessors) return cut;
  }
}

// Of two channels in float32 with stride 2, where blocks are few: fewest accesses, if a
// multiprocessor that holds as many blocks as it can makes all of theirs in the time, so that waves
// of blocks count as whole. Four columns load the ones between two threads less often, two make
// more blocks, which may fill the last wave. Where there are many waves, more blocks are better. In
// wide rows two columns and three rows are, by factors that were fitted to 41 problems.
Cut cut_strided_floats(const DepthwiseConv2dParams& p, int multiprocessors) {
  constexpr int kMostRows = 4;
  constexpr int64_t kManyWaves = 7, kWideRow = 28;
  constexpr double kFourColumns = 1.3, kShortStrips = 0.9;  // costs of wide rows
  const auto waves_of = [&](const Cut& cut) {
    const int64_t blocks = ceil_div(cut.threads(p), kThreads);
    return ceil_div(blocks, resident_blocks(cut.columns) * multiprocessors);
  };
  Cut best = cut_by_threads(p, kMostChannels, 2, kMostRows, multiprocessors);
  if (waves_of(best) >= kManyWaves) return best;
  const bool wide = p.out_w >= kWideRow;
  double fewest = std::numeric_limits<double>::infinity();
  for (int columns : {4, 2}) {
    for (int most : {kMostRows, kMostRows - 1}) {
      const Cut cut = cut_by_threads(p, kMostChannels, columns, most, multiprocessors);
      // 2 * columns + 1 loads, and the output takes about as long as two.
      const int64_t accesses =
          waves_of(cut) * resident_blocks(columns) * (2 * cut.rows + 1) * (2 * columns + 3);
      auto cost = static_cast<double>(accesses);
      if (wide) cost *= columns == 4 ? kFourColumns : most < kMostRows ? kShortStrips : 1.0;
      if (cost < fewest) fewest = cost, best = cut;
    }
  }
  return best;
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  // Threads of a multiprocessor below which one wants narrower accesses.
  constexpr int64_t kFewThreads = 192;
  const int channels = aligned_channels(p, element_bytes);
  const int columns = p.stride_h == 1 ? 4 : 2;
  // A strip reads 3 - stride rows that the next one reads too, and waits for its first two; short
  // strips end at different times. Half precision has half the bytes under way.
  const int most = (p.stride_h == 1 ? 14 : 8) / (element_bytes / 2);
  const bool strided_floats = element_bytes == 4 && p.stride_h == 2 && channels == kMostChannels;
  const Cut cut = strided_floats ? cut_strided_floats(p, multiprocessors)
                                 : cut_by_threads(p, channels, columns, most, multiprocessors);
  if (cut.threads(p) >= kFewThreads * multiprocessors) return cut;
  return {1, columns, cut.rows};
}

}  // namespace channel_direct
}  // namespace dwswap
