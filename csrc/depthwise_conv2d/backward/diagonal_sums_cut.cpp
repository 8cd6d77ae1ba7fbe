#include "depthwise_conv2d/backward/diagonal_sums_cut.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/cache_reads.h"
#include "depthwise_conv2d/problem_key.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace diagonal_sums {
namespace {

int64_t slices(const Cut& cut, const GradientParams& p) {
  return ceil_div(p.channels, cut.groups * kGroup);
}

bool fits(const Cut& cut, const Device& device) {
  return cut.input_columns() <= kMostBoxElements && cut.shared_bytes() <= device.shared_per_block;
}

// Columns and images of a stage of so many teams, and the teams that these take.
void choose_pixels(Cut& cut, const GradientParams& p, int teams) {
  const int most = teams * kTeamPixels;
  const int64_t tiles = ceil_div(p.out_w, most);
  cut.columns = static_cast<int>(ceil_div(p.out_w, tiles));
  const int images = tiles == 1 ? most / cut.columns : 1;
  cut.images = static_cast<int>(std::clamp<int64_t>(images, 1, p.batch));
  cut.teams = static_cast<int>(ceil_div(cut.columns * cut.images, kTeamPixels));
}

void choose_stage_rows(Cut& cut, const Device& device) {
  // Blocks of few warps share a multiprocessor.
  const int most_bytes = (cut.threads() <= 256 ? 20 : 70) * 1024;
  while (cut.stage_rows < kMostStageRows) {
    ++cut.stage_rows;
    if (cut.stage_bytes() <= most_bytes && fits(cut, device)) continue;
    --cut.stage_rows;
    return;
  }
}

// Blocks that all multiprocessors have at once.
int64_t resident_blocks(const Cut& cut, const Device& device) {
  constexpr int kBlockBytes = 1024;  // of shared memory that the system takes
  const int by_registers = kRegisters / (registers(cut.kernel) * cut.threads());
  const int by_memory = device.shared_per_multiprocessor / (cut.shared_bytes() + kBlockBytes);
  return int64_t{device.multiprocessors} * std::max(1, std::min(by_registers, by_memory));
}

Walks walks_of(const Cut& cut, const GradientParams& p, const Device& device) {
  Walks walks{};
  walks.columns = ceil_div(p.out_w, cut.columns) * ceil_div(p.batch, cut.images);
  walks.height = p.out_h;
  walks.more_rows = seen_rows(cut.kernel, cut.stride) - 1;
  walks.walkers = 1;
  walks.blocks = slices(cut, p);
  walks.resident = resident_blocks(cut, device);
  walks.reduction = 6;
  walks.enough_blocks = cut.boxes() > 1 ? 100 : 75;
  return walks;
}

// The constants of the times below, in us, fit 7200 times of 356 shapes on an H200 (64 images;
// benchmarks/NOTES.md).

// All pixels, at the speed of memory.
double reading_us(const Cut& cut, const CacheReads& read, const GradientParams& p) {
  constexpr double kBytes = 4.45e6;  // per us
  constexpr double kHalo = 1.5;      // what several blocks read costs more than its bytes
  // Beside its own bytes a block reads sectors to their ends; lines too where the blocks that want
  // the rest of them come too late to find it in the cache, as they do in large images.
  constexpr double kSectors = 0.1, kLines = 0.14, kLargeBytes = 300e6;
  const int64_t tiles = ceil_div(p.out_w, cut.columns);
  const int64_t strips = ceil_div(p.out_h, cut.split.rows);
  const int64_t in_w = p.in_w + (tiles - 1) * (cut.kernel - cut.stride);
  const int64_t in_h = p.in_h + (strips - 1) * (cut.kernel - cut.stride);
  const int64_t outputs = p.out_h * p.out_w;
  const auto pixels = static_cast<double>(p.in_h * p.in_w + outputs);
  const double bytes = 2.0 * static_cast<double>(p.batch * p.channels) * pixels *
                       std::pow(static_cast<double>(in_h * in_w + outputs) / pixels, kHalo);
  const double sectors = kSectors * (read.sectors - 1.0);
  const double lines = kLines * (read.lines - 1.0) * bytes / (bytes + kLargeBytes);
  return bytes * (1.0 + sectors + lines) / kBytes;
}

// All products, by all tensor cores.
double multiplying_us(const Cut& cut, const GradientParams& p) {
  constexpr double kProductsDone = 0.13e6;  // per us
  constexpr double kFirstRows = 1.9;  // for a row of input that is read for the strip above as well
  const int64_t walks = ceil_div(p.out_w, cut.columns) * ceil_div(p.out_h, cut.split.rows) *
                        ceil_div(p.batch, cut.images) * slices(cut, p);
  const int64_t of_a_row = kProducts * cut.kernel * ceil_div(cut.kernel, 2);
  const int seen = seen_rows(cut.kernel, cut.stride) - 1;
  return static_cast<double>(walks * cut.groups * cut.teams * of_a_row) *
         (static_cast<double>(cut.split.rows) + kFirstRows * seen) / kProductsDone;
}

// Of a launch: cuts chosen by it take 1.03 times as long as the best of some 20 of their shape.
double expected_us(const Cut& cut, const CacheReads& read, const GradientParams& p,
                   const Device& device) {
  constexpr double kReduction = 1.9;                      // the second kernel
  constexpr double kWave = 1.7, kKilobyte = 0.01;         // until a block has its first stages
  constexpr double kStage = 0.32, kRowOfTaps = 0.035;     // of a block alone
  constexpr double kIdle = 0.35;                          // of the places that the last wave leaves
  constexpr double kCrowded = 0.08, kCrowdedBytes = 2e5;  // in flight, per multiprocessor
  constexpr double kOverlap = 1.8;  // of reading, multiplying and waiting: their norm
  const int64_t resident = resident_blocks(cut, device);
  const double fill =
      static_cast<double>(cut.split.shares * slices(cut, p)) / static_cast<double>(resident);
  const double waves = std::ceil(fill);
  const double idle = fill < 1.0 ? 1.0 : 1.0 - kIdle + kIdle * waves / fill;
  const auto in_flight =
      static_cast<double>(resident / device.multiprocessors * cut.shared_bytes());
  const double slower = idle * std::pow(in_flight / kCrowdedBytes, kCrowded);
  const int seen = seen_rows(cut.kernel, cut.stride) - 1;
  const int64_t stages = cut.split.share * ceil_div(cut.split.rows + seen, cut.stage_rows);
  const double waiting = waves * static_cast<double>(stages) *
                         (kStage + kRowOfTaps * static_cast<double>(cut.stage_rows * cut.kernel));
  const double streaming = std::pow(std::pow(slower * reading_us(cut, read, p), kOverlap) +
                                        std::pow(slower * multiplying_us(cut, p), kOverlap) +
                                        std::pow(waiting, kOverlap),
                                    1.0 / kOverlap);
  const double first_bytes =
      static_cast<double>(std::min<int64_t>(stages, kSlots) * cut.stage_bytes()) / kSlots;
  return waves * (kWave + kKilobyte * first_bytes / 1024.0) + streaming +
         (cut.split.shares > 1 ? kReduction : 0.0);
}

// Groups of 8 channels that a block may have: some, or all, as one box that needs no swizzle or as
// boxes of 128 bytes.
std::vector<int> group_counts(const GradientParams& p) {
  constexpr int64_t kMostWhole = 9;
  const int64_t all = p.channels / kGroup, boxes = ceil_div(all, kBoxGroups) * kBoxGroups;
  std::vector<int> counts;
  for (const int groups : {2, 4, kBoxGroups})
    if (groups <= all) counts.push_back(groups);
  if (all % 2 == 1 && all <= kMostWhole) counts.push_back(static_cast<int>(all));
  if (boxes > all && boxes <= most_warps(static_cast<int>(p.kernel_h)))
    counts.push_back(static_cast<int>(boxes));
  return counts;
}

Cut search_cut(const GradientParams& p, const Device& device) {
  constexpr int kMostTeams = 4;
  Search<Cut> search;
  for (const int groups : group_counts(p)) {
    const CacheReads read = cache_reads(p.channels * 2, groups * kGroupBytes);
    for (int teams = 1; teams <= kMostTeams; ++teams) {
      Cut cut{};
      cut.kernel = static_cast<int>(p.kernel_h), cut.stride = static_cast<int>(p.stride_h);
      cut.groups = groups, cut.stage_rows = 1;
      choose_pixels(cut, p, teams);
      if (cut.groups * cut.teams > most_warps(cut.kernel) || !fits(cut, device)) break;
      choose_stage_rows(cut, device);
      const Walks walks = walks_of(cut, p, device);
      for (int64_t strips = 1; strips <= most_strips(walks); strips += ceil_div(strips, 2)) {
        cut.split = search_shares(walks, strips).split;
        search.consider(expected_us(cut, read, p, device), cut);
      }
    }
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const GradientParams& p, const Device& device) {
  return memoized(problem_key(p, device), [&] { return search_cut(p, device); });
}

}  // namespace diagonal_sums
}  // namespace dwswap
