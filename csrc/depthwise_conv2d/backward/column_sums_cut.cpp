#include "depthwise_conv2d/backward/column_sums_cut.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/backward/split.h"
#include "depthwise_conv2d/cache_reads.h"
#include "depthwise_conv2d/problem_key.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace column_sums {
namespace {

// What a cut makes of a problem.
struct Work {
  int64_t slices, tiles, strips, items;  // items: strips of all images
  int64_t resident;                      // blocks on all multiprocessors at once
  int64_t rounds, stages;                // items of a block; stages of an item
};

Work work_of(const Cut& cut, const GradientParams& p, const Device& device) {
  constexpr int kBlockBytes = 1024;  // of shared memory that the system takes
  Work w{};
  w.slices = ceil_div(p.channels, 2 * cut.pairs);
  w.tiles = ceil_div(p.out_w, cut.columns());
  w.strips = ceil_div(p.out_h, cut.rows);
  w.items = w.tiles * w.strips * ceil_div(p.batch, cut.images);
  const int by_registers = kBlocks * kMaxThreads / cut.threads();
  const int by_memory = device.shared_per_multiprocessor / (cut.shared_bytes() + kBlockBytes);
  w.resident = int64_t{device.multiprocessors} * std::clamp(by_memory, 1, by_registers);
  w.rounds = ceil_div(w.items, cut.shares);
  w.stages = ceil_div(cut.rows + seen_rows(cut.stride) - 1, seen_rows(cut.stride));
  return w;
}

// The constants of the times below, in us, fit 8000 times of 448 shapes on an H200 (64 images;
// benchmarks/NOTES.md).

// All pixels, at the speed of memory.
double reading_us(const Cut& cut, const Work& w, const CacheReads& read, const GradientParams& p) {
  constexpr double kBytes = 4.57e6;  // per us
  // What strips side by side read twice comes from the cache, what those above each other do
  // has left it.
  constexpr double kBeside = 0.22, kBelow = 1.6;
  // Blocks that want the rest of a line come later, the more so in large images; short pieces
  // are slower.
  constexpr double kSectors = 0.25, kLines = 0.1, kLinesBytes = 3e8, kLinesGrowth = 0.6;
  constexpr double kPiece = 3.6;  // bytes
  const auto input = static_cast<double>(p.in_h * p.in_w);
  const auto output = static_cast<double>(p.out_h * p.out_w);
  const auto beside = static_cast<double>((w.tiles - 1) * (kKernel - cut.stride) * p.in_h);
  const auto below = static_cast<double>((w.strips - 1) * (kKernel - cut.stride) * p.in_w);
  const auto pixel = static_cast<double>(p.batch * p.channels * cut.element_bytes);
  const double growth = std::pow(pixel * (input + output) / kLinesBytes, kLinesGrowth);
  const double slower = 1.0 + kSectors * (read.sectors - 1.0) +
                        kLines * (read.lines - 1.0) * growth + kPiece / cut.pixel_bytes();
  return pixel * (input + output + kBeside * beside + kBelow * below) * slower / kBytes;
}

// All stages, on their way from the cache.
double fetching_us(const Cut& cut, const Work& w) {
  constexpr double kBytes = 8.9e6;  // per us
  return static_cast<double>(w.items * w.slices * w.stages) * cut.stage_bytes() / kBytes;
}

// All multiply-adds.
double adding_us(const Cut& cut, const Work& w, const Device& device) {
  constexpr double kPerUs = 7e3;  // instructions of a multiprocessor
  constexpr double kStep = 97.0, kLoad = 0.24, kWiden = 2.4;
  const int loads = ((kColumns - 1) * cut.stride + kKernel) * cut.stride + kColumns;
  const double step = kStep + loads * (kLoad + (cut.element_bytes == 2 ? kWiden : 0.0));
  const int64_t steps = w.items * w.slices * w.stages * seen_rows(cut.stride);
  return static_cast<double>(steps * (cut.threads() / 32)) * step /
         (kPerUs * device.multiprocessors);
}

// The second kernel.
double reducing_us(const Cut& cut, const GradientParams& p) {
  constexpr double kLaunch = 1.7, kShare = 0.0023, kBytes = 5e5;  // per us
  if (cut.shares == 1) return 0.0;
  const auto bytes = static_cast<double>(sums_bytes(p, cut.shares));
  return kLaunch + kShare * cut.shares + bytes / kBytes;
}

// Of a launch: cuts chosen by it take 1.014 times as long as the best of some 18 of their shape.
double expected_us(const Cut& cut, const Work& w, const CacheReads& read, const GradientParams& p,
                   const Device& device) {
  constexpr double kWave = 2.95;                        // until a block has its first stages
  constexpr double kStage = 0.44, kStageOfRows = 0.04;  // of a block alone
  constexpr double kIdle = 0.094;                       // of the places without a block
  constexpr double kOverlap = 3.2;  // of reading, fetching, adding and waiting: their norm
  const double fill = static_cast<double>(cut.shares * w.slices) / static_cast<double>(w.resident);
  const double waves = std::ceil(fill);
  // Of the rounds the last one is not for all blocks.
  const double even = static_cast<double>(w.rounds * cut.shares) / static_cast<double>(w.items);
  const double slower = even * (1.0 - kIdle + kIdle * waves / fill);
  const double waiting =
      waves * static_cast<double>(w.rounds * w.stages) * (kStage + kStageOfRows * cut.stride);
  const double streaming = std::pow(std::pow(slower * reading_us(cut, w, read, p), kOverlap) +
                                        std::pow(slower * fetching_us(cut, w), kOverlap) +
                                        std::pow(slower * adding_us(cut, w, device), kOverlap) +
                                        std::pow(waiting, kOverlap),
                                    1.0 / kOverlap);
  return waves * kWave + streaming + reducing_us(cut, p);
}

// All strips, shared by blocks.
void consider_shares(Search<Cut>& search, Cut cut, const CacheReads& read, const GradientParams& p,
                     const Device& device) {
  constexpr int64_t kMostRounds = 4;
  cut.shares = 1;
  const Work whole = work_of(cut, p, device);
  search.consider(expected_us(cut, whole, read, p, device), cut);
  const int64_t most = std::min(whole.items, std::max<int64_t>(1, whole.resident / whole.slices));
  const int64_t least_rounds = ceil_div(whole.items, most);
  for (int64_t i = 0; i < kMostRounds; ++i) {
    const int64_t shares = ceil_div(whole.items, least_rounds + i);
    if (shares == 1 || shares == cut.shares) continue;
    cut.shares = static_cast<int>(shares);
    search.consider(expected_us(cut, work_of(cut, p, device), read, p, device), cut);
  }
}

// So many rows per strip, and stages in shared memory.
void consider_rows(Search<Cut>& search, Cut cut, const CacheReads& read, const GradientParams& p,
                   const Device& device) {
  constexpr int64_t kMostStrips = 16, kLeastRows = 8;
  const int64_t most_strips = std::clamp<int64_t>(p.out_h / kLeastRows, 1, kMostStrips);
  for (int64_t strips = 1; strips <= most_strips; strips += ceil_div(strips, 2)) {
    cut.rows = static_cast<int>(ceil_div(p.out_h, strips));
    for (cut.slots = 2; cut.slots <= kMostSlots; ++cut.slots) {
      if (cut.shared_bytes() > device.shared_per_block) break;
      consider_shares(search, cut, read, p, device);
    }
  }
}

Cut search_cut(const GradientParams& p, int element_bytes, const Device& device) {
  constexpr int kRunBytes = 64;  // a slice of channels is a multiple of it, or all
  const auto all_pairs = static_cast<int>(p.channels / 2);
  const int step = kRunBytes / (2 * element_bytes);
  const auto wide = static_cast<int>(ceil_div(p.out_w, kColumns));
  Search<Cut> search;
  Cut cut{};
  cut.stride = static_cast<int>(p.stride_h), cut.element_bytes = element_bytes;
  int last_slices = 0;
  for (int pairs = std::min(step, all_pairs); pairs <= std::min(all_pairs, kMostBoxElements / 2);
       pairs = pairs < all_pairs ? std::min(pairs + step, all_pairs) : all_pairs + 1) {
    // The least of those that make as many slices.
    const auto slices = static_cast<int>(ceil_div(all_pairs, pairs));
    if (slices == last_slices) continue;
    last_slices = slices;
    cut.pairs = pairs;
    const CacheReads read = cache_reads(p.channels * element_bytes, cut.pixel_bytes());
    int last_groups = 0;
    for (int most = std::min(wide, kMaxThreads / pairs); most >= 1; --most) {
      const int64_t tiles = ceil_div(wide, most);
      cut.groups = static_cast<int>(ceil_div(wide, tiles));
      if (cut.groups == last_groups || cut.input_columns() > kMostBoxElements) continue;
      last_groups = cut.groups, cut.images = 1;
      const auto most_images = std::min<int64_t>(p.batch, tiles == 1 ? kMaxThreads : 1);
      for (; cut.images <= most_images && cut.busy_threads() <= kMaxThreads; cut.images *= 2)
        consider_rows(search, cut, read, p, device);
    }
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const GradientParams& p, int element_bytes, const Device& device) {
  return memoized(std::pair(problem_key(p, device), element_bytes),
                  [&] { return search_cut(p, element_bytes, device); });
}

}  // namespace column_sums
}  // namespace dwswap
