#include "depthwise_conv2d/channel_columns_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace channel_columns {
namespace {

// Registers of a quarter of a multiprocessor hold so many warps; they are in whole, and a block's
// are spread over the quarters. Activations take up to 128 registers of a thread.
int warps_that_fit(int columns, int stride, bool plain) {
  constexpr int kQuarters = 4;
  if (!plain) return kQuarters * 4;
  if (stride == 1) return kQuarters * (columns == 7 ? 4 : 6);  // at most 112 and 80 registers
  return kQuarters * (columns == 7 ? 5 : 7);                   // 96 and 72
}

// Time in clocks of a multiprocessor, but for a constant and a factor that its choices share.
// Fitted to some 5900 measurements on an H200, for the least estimate to fall on a fast cut; cuts
// that were not measured were held back from undercutting them by far.
double estimate(const DepthwiseConv2dParams& p, const Cut& cut, int element_bytes,
                int multiprocessors) {
  constexpr int kLineBytes = 128;
  constexpr double kSharedBytes = 228 * 1024, kBlockBytes = 1024, kMostBlocks = 32.0;
  constexpr double kStartClocks = 1400.0, kFillBytesPerClock = 112.0;  // of the first copies
  constexpr double kLatency = 285.0;                                   // of a later copy
  constexpr double kClocksPerInstruction = 1.23;
  constexpr double kInstructionsPerClock = 4.0;  // of all warps together
  constexpr double kStepInstructions = 33.0;     // beside arithmetic, loads and stores
  constexpr double kMemoryBytesPerClock = 32.0, kCopyBytesPerClock = 69.0;
  constexpr double kStoreBytesPerClock = 39.0;
  constexpr double kBorder = 0.15;  // of bytes read twice, what the L2 cache does not hold
  // Of the lines that a run of channels cuts at its ends, in memory and in shared memory: less than
  // whole ones, as sectors are copied.
  constexpr double kMemoryLines = 0.36, kSharedLines = 0.6;
  constexpr double kIdle = 0.14;  // of the share that a last, incomplete wave leaves idle
  // Blocks that start together wait together, for memory at first and for arithmetic at last, until
  // later waves or many chunks draw them apart.
  constexpr double kLockstep = 1.27, kLockstepWaves = 1.5, kLockstepChunks = 36.0;
  const auto stride = static_cast<int>(p.stride_h);
  const int open = ceil_div(kKernel, stride);
  const int warps = ceil_div(cut.threads(), 32);
  const int tile_w = (cut.groups * cut.columns - 1) * stride + kKernel;
  const int run = 2 * cut.pairs * element_bytes;
  const auto pitch = static_cast<int>(p.channels * element_bytes);

  const double chunk_bytes = static_cast<double>(open) * stride * tile_w * run;
  const double shared = cut.stages * chunk_bytes + run * kKernel * kKernel + kBlockBytes;
  const double fit = warps_that_fit(cut.columns, stride, p.is_plain()) / warps;  // in whole
  const double resident =
      std::max(1.0, std::floor(std::min({kMostBlocks, kSharedBytes / shared, fit})));
  const double segments = ceil_div(p.out_h, cut.rows);
  const double blocks = static_cast<double>(p.batch) * ceil_div(p.channels, 2 * cut.pairs) *
                        ceil_div(p.out_w, cut.columns * cut.groups) * segments / multiprocessors;
  const double share = blocks / resident;
  const double waves = std::max(share, 1.0);
  const double idle =
      share > 1.0 ? std::ceil(share) / share - 1.0 : std::ceil(blocks) / blocks - 1.0;

  const int convert = element_bytes == 2 ? 3 : 1;  // with the load
  const double instructions =
      open * (stride * ((cut.columns - 1) * stride + kKernel) * convert +
              2.0 * cut.columns * kKernel * kKernel + cut.columns * (element_bytes == 2 ? 3 : 4) +
              kStepInstructions);
  const double chunks = ceil_div(cut.rows + open - 1, open);
  const double issue = blocks * warps * chunks * instructions / kInstructionsPerClock;

  const int run_border = std::gcd(run, kLineBytes);  // where runs begin in shared memory
  const int border = std::gcd(run_border, pitch);    // and in memory
  const double lines =
      1.0 + (kMemoryLines * (kLineBytes - border) + kSharedLines * (kLineBytes - run_border)) /
                std::min(run, pitch);
  const double once = static_cast<double>(p.batch) * p.in_h * p.in_w * pitch / multiprocessors;
  const double in_rows = std::min<double>((cut.rows - 1) * stride + kKernel, p.in_h);
  const double copied = blocks * in_rows * std::min<double>(tile_w, p.in_w) * run;
  const double copies = copied * lines / kCopyBytesPerClock;
  const double out_bytes =
      static_cast<double>(p.batch) * p.out_h * p.out_w * pitch / multiprocessors;
  const double memory =
      (once + kBorder * std::max(0.0, copied - once) + out_bytes) / kMemoryBytesPerClock;
  // A store of a warp is in pieces, one per group that it spans; each cuts lines at its ends.
  const double pieces =
      warps + cut.groups -
      static_cast<double>(ceil_div(cut.threads() * std::gcd(cut.pairs, 32), 32 * cut.pairs));
  const double stores =
      out_bytes * (1.0 + (kLineBytes - border) * pieces / (run * cut.groups)) / kStoreBytesPerClock;

  // A stage is refilled once it is used up: the others hide the latency.
  const double step = instructions * kClocksPerInstruction;
  const double period = std::max(step, (kLatency + step) / cut.stages);
  const double fill = std::min<double>(cut.stages, chunks) * chunk_bytes * lines *
                      std::min(resident, std::ceil(blocks)) / kFillBytesPerClock;
  const double chain = waves * (kStartClocks + fill + chunks * period);

  const double inside = std::max(1.0, 1.0 / blocks) *  // of a multiprocessor that has a block
                        std::sqrt(copies * copies + stores * stores + issue * issue);
  const double time = std::sqrt(memory * memory + inside * inside + chain * chain);
  const double lockstep = kLockstep / (waves + kLockstepWaves + chunks / kLockstepChunks);
  return time * (1.0 + kIdle * idle + lockstep);
}

Cut search_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  constexpr int kRunBytes = 64;  // a slice of channels is a multiple of it, or all
  constexpr int kMostSegments = 16;
  const auto stride = static_cast<int>(p.stride_h);
  const auto all_pairs = static_cast<int>(p.channels / 2);
  const int step = kRunBytes / 2 / element_bytes;
  const int rows = ceil_div(kKernel, stride) * stride;  // of a chunk
  Search<Cut> search;
  const auto consider = [&](int columns, int pairs, int groups) {
    const int tile_w = (groups * columns - 1) * stride + kKernel;
    if (tile_w > kMostBoxElements) return;
    for (int segments = 1; segments <= std::min<int64_t>(kMostSegments, p.out_h); ++segments) {
      for (const int stages : {2, 3, 4}) {
        if (stages * rows * tile_w * 2 * pairs * element_bytes > kStageBytes) continue;
        const Cut cut{columns, pairs, groups, static_cast<int>(ceil_div(p.out_h, segments)),
                      stages};
        search.consider(estimate(p, cut, element_bytes, multiprocessors), cut);
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
  return search.best();
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  const std::array<int64_t, 10> key{p.is_plain(),  p.batch,        p.channels, p.in_h,
                                    p.in_w,        p.out_h,        p.out_w,    p.stride_h,
                                    element_bytes, multiprocessors};
  return memoized(key, [&] { return search_cut(p, element_bytes, multiprocessors); });
}

}  // namespace channel_columns
}  // namespace dwswap
