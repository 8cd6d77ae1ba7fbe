#include "depthwise_conv2d/backward/diagonal_sums_cut.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/memo.h"
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

void choose_split(Cut& cut, const GradientParams& p, const Device& device) {
  Walks walks{};
  walks.columns = ceil_div(p.out_w, cut.columns) * ceil_div(p.batch, cut.images);
  walks.height = p.out_h;
  walks.more_rows = seen_rows(cut.kernel, cut.stride) - 1;
  walks.walkers = 1;
  walks.blocks = slices(cut, p);
  walks.resident = resident_blocks(cut, device);
  walks.reduction = 6;
  walks.enough_blocks = cut.boxes() > 1 ? 100 : 75;
  cut.split = search_split(walks);
}

// Bytes of the sectors that the pieces of pixels lie in, of a byte of these: blocks have so many
// channels of a pixel, and pixels need not begin where sectors do.
double sector_bytes(const Cut& cut, const GradientParams& p) {
  constexpr int64_t kSector = 64, kPixels = 4;  // of 16 bytes at least: a sector's period
  const int64_t pixel = p.channels * 2, piece = cut.groups * kGroupBytes;
  int64_t sectors = 0;
  for (int64_t begin = 0; begin < kPixels * pixel; begin += pixel) {
    for (int64_t from = begin; from < begin + pixel; from += piece) {
      const int64_t to = std::min(from + piece, begin + pixel);
      sectors += ceil_div(to, kSector) - from / kSector;
    }
  }
  return static_cast<double>(sectors * kSector) / static_cast<double>(kPixels * pixel);
}

// Of a launch, in us. The constants fit the times of 250 shapes of torchvision's with up to 12 cuts
// each on an H200 (benchmarks/NOTES.md): cuts chosen by it take 1.03 times as long as the best
// ones.
double expected_us(const Cut& cut, const GradientParams& p, const Device& device) {
  constexpr double kWave = 2.0, kStage = 0.8;  // of a block, until the first and between stages
  constexpr double kBytes = 4.2e6, kProductsDone = 0.115e6;  // per us
  constexpr double kEnough = 0.4;  // of the blocks that fit at once, to be as fast as all
  const int64_t tiles = ceil_div(p.out_w, cut.columns);
  const int64_t strips = ceil_div(p.out_h, cut.split.rows);
  const auto more_columns = static_cast<double>((tiles - 1) * (cut.kernel - cut.stride));
  const auto more_rows = static_cast<double>((strips - 1) * (cut.kernel - cut.stride));
  const double read =
      (static_cast<double>(p.in_w) + more_columns) * (static_cast<double>(p.in_h) + more_rows) +
      static_cast<double>(p.out_h * p.out_w);
  // A half of what lies in sectors beside a block's own is in the cache when the next one reads it.
  const double sectors = (1.0 + sector_bytes(cut, p)) / 2.0;
  const double reading = 2.0 * static_cast<double>(p.batch * p.channels) * read * sectors / kBytes;

  const int seen = seen_rows(cut.kernel, cut.stride) - 1;
  const int64_t walks = tiles * strips * ceil_div(p.batch, cut.images) * slices(cut, p);
  const int products = kProducts * cut.kernel * static_cast<int>(ceil_div(cut.kernel, 2));  // a row
  const double multiplying = static_cast<double>(walks * cut.groups * cut.teams * products) *
                             (static_cast<double>(cut.split.rows) + 0.5 * seen) / kProductsDone;

  const double fill = static_cast<double>(cut.split.shares * slices(cut, p)) /
                      static_cast<double>(resident_blocks(cut, device));
  const double waves = std::ceil(fill);
  // The last wave is a part of one, but its blocks are faster for it.
  const double busy = fill < 1.0 ? std::max(fill, kEnough) : 0.5 * (fill + waves);
  const int64_t stages = cut.split.share * ceil_div(cut.split.rows + seen, cut.stage_rows);
  return waves * kWave + std::max(busy / fill * (reading + multiplying),
                                  waves * static_cast<double>(stages) * kStage);
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
  Cut best{};
  double best_us = std::numeric_limits<double>::infinity();
  for (const int groups : group_counts(p)) {
    for (int teams = 1; teams <= kMostTeams; ++teams) {
      Cut cut{};
      cut.kernel = static_cast<int>(p.kernel_h), cut.stride = static_cast<int>(p.stride_h);
      cut.groups = groups, cut.stage_rows = 1;
      choose_pixels(cut, p, teams);
      if (cut.groups * cut.teams > most_warps(cut.kernel) || !fits(cut, device)) break;
      choose_stage_rows(cut, device);
      choose_split(cut, p, device);
      const double us = expected_us(cut, p, device);
      if (us < best_us) best_us = us, best = cut;
    }
  }
  return best;
}

}  // namespace

Cut choose_cut(const GradientParams& p, const Device& device) {
  return memoized(problem_key(p, device), [&] { return search_cut(p, device); });
}

}  // namespace diagonal_sums
}  // namespace dwswap
