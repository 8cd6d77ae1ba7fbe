#include "depthwise_conv2d/channel_columns_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/memo.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace channel_columns {
namespace {

// Time in clocks of a multiprocessor, up to a constant. Fitted to some 800 measurements on an H200:
// within 8 % of those near the best one of their problem.
double estimate(const DepthwiseConv2dParams& p, const Cut& cut, int element_bytes,
                int multiprocessors) {
  constexpr double kLatency = 1360.0;  // of the first copy
  constexpr double kClocksPerInstruction = 0.82;
  constexpr double kInstructionsPerClock = 4.0;              // of all warps together
  constexpr double kChunkClocks = 83.0, kWarpClocks = 53.0;  // to meet at the end of a chunk
  // What a run of channels costs beyond its own bytes: more where pixels begin within a line of the
  // cache, nothing where runs follow each other without gaps.
  constexpr double kRunBytes = 11.6, kUnalignedRunBytes = 20.6;
  constexpr int kLineBytes = 64;
  constexpr double kBorder = 0.15;         // cost of bytes read twice: most come from the L2 cache
  constexpr double kBytesPerClock = 18.0;  // in a copy
  constexpr double kSharedBytes = 228 * 1024, kBlockBytes = 1024, kThreads = 512;
  const auto stride = static_cast<int>(p.stride_h);
  const int open = ceil_div(kKernel, stride);
  const int warps = ceil_div(cut.threads(), 32);
  const int tile_w = (cut.groups * cut.columns - 1) * stride + kKernel;
  const int run = 2 * cut.pairs * element_bytes;
  const int convert = element_bytes == 2 ? 3 : 1;  // with the load
  const double instructions = open * (stride * ((cut.columns - 1) * stride + kKernel) * convert +
                                      2.0 * cut.columns * kKernel * kKernel +
                                      cut.columns * (element_bytes == 2 ? 3 : 4) + 30.0);
  const double shared = static_cast<double>(cut.stages) * open * stride * tile_w * run +
                        run * kKernel * kKernel + kBlockBytes;
  const double resident =
      std::max(1.0, std::floor(std::min({32.0, kSharedBytes / shared, kThreads / (32.0 * warps)})));

  const double segments = ceil_div(p.out_h, cut.rows);
  const double blocks = static_cast<double>(p.batch) * ceil_div(p.channels, 2 * cut.pairs) *
                        ceil_div(p.out_w, cut.columns * cut.groups) * segments;
  const double chunks = ceil_div(cut.rows + open - 1, open);
  const double share = blocks / (resident * multiprocessors);
  const double waves = share < 1.0 ? 1.0 : 0.5 * (share + std::ceil(share));
  const double chain = waves * (kLatency + chunks * (instructions * kClocksPerInstruction +
                                                     kChunkClocks + kWarpClocks * (warps - 1)));
  const double issue =
      blocks * warps * chunks * instructions / multiprocessors / kInstructionsPerClock;
  const double in_rows = std::min<double>((cut.rows - 1) * stride + kKernel, p.in_h);
  const double once = static_cast<double>(p.batch) * p.channels * p.in_h * p.in_w * element_bytes;
  const double copied = blocks * in_rows * std::min<double>(tile_w, p.in_w) * run;
  const double in_bytes = once + kBorder * std::max(0.0, copied - once);
  const double out_bytes =
      static_cast<double>(p.batch) * p.channels * p.out_h * p.out_w * element_bytes;
  const bool aligned = p.channels * element_bytes % kLineBytes == 0;
  const double gap = 2 * cut.pairs >= p.channels ? 0.0 : aligned ? kRunBytes : kUnalignedRunBytes;
  const double memory =
      (in_bytes * (1.0 + gap / run) + out_bytes) / multiprocessors / kBytesPerClock;
  return std::sqrt(chain * chain + issue * issue + memory * memory);
}

Cut search_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  constexpr int kRunBytes = 64;  // a slice of channels is a multiple of it, or all
  constexpr int kMostSegments = 16;
  const auto stride = static_cast<int>(p.stride_h);
  const auto all_pairs = static_cast<int>(p.channels / 2);
  const int step = kRunBytes / 2 / element_bytes;
  const int rows = ceil_div(kKernel, stride) * stride;  // of a chunk
  Cut best{};
  double best_estimate = std::numeric_limits<double>::infinity();
  const auto consider = [&](int columns, int pairs, int groups) {
    const int tile_w = (groups * columns - 1) * stride + kKernel;
    if (tile_w > kMostBoxElements) return;
    for (int segments = 1; segments <= std::min<int64_t>(kMostSegments, p.out_h); ++segments) {
      for (const int stages : {2, 3, 4}) {
        if (stages * rows * tile_w * 2 * pairs * element_bytes > kStageBytes) continue;
        const Cut cut{columns, pairs, groups, static_cast<int>(ceil_div(p.out_h, segments)),
                      stages};
        const double time = estimate(p, cut, element_bytes, multiprocessors);
        if (time < best_estimate) best_estimate = time, best = cut;
      }
    }
  };
  for (const int columns : {7, 4}) {
    const auto wide = static_cast<int>(ceil_div(p.out_w, columns));
    for (int pairs = std::min(step, all_pairs); pairs <= std::min(kMaxThreads, all_pairs);
         pairs = pairs < all_pairs ? std::min(pairs + step, all_pairs) : all_pairs + 1) {
      for (int groups = 1; groups <= wide && pairs * groups <= kMaxThreads; ++groups) {
        consider(columns, pairs, groups);
      }
    }
  }
  return best;
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  const std::array<int64_t, 9> key{p.batch, p.channels, p.in_h,        p.in_w,         p.out_h,
                                   p.out_w, p.stride_h, element_bytes, multiprocessors};
  return memoized(key, [&] { return search_cut(p, element_bytes, multiprocessors); });
}

}  // namespace channel_columns
}  // namespace dwswap
