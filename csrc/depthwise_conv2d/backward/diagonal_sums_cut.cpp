#include "depthwise_conv2d/backward/diagonal_sums_cut.h"

#include <algorithm>

#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace diagonal_sums {
namespace {

constexpr int kTeamSegments = 2 * kProducts;

// Measured at 64 images (benchmarks/NOTES.md). `segments`: of a row of grad_output.
//
// Where pixels do not begin at lines of the cache, a block that has all the channels reads fastest,
// by one box, or by boxes of 128 bytes. Else small blocks hide each other's latency, and wide ones
// have less border.
void choose_warps(Cut& cut, const GradientParams& p, int64_t segments) {
  const int64_t groups = p.channels / kGroup;
  const auto with = [&](int64_t own, int teams) {
    cut.groups = static_cast<int>(own), cut.teams = teams;
  };
  constexpr int64_t kMostWhole = 9;
  const bool is_whole = groups % 2 == 1 && groups <= kMostWhole;
  if (cut.kernel == 7) return with(4, 1);
  if (cut.kernel == 5) {
    if (is_whole && segments > kTeamSegments) return with(groups, 1);
    return with(4, segments <= 2 || segments == kTeamSegments ? 1 : 4);
  }
  if (segments <= 2) {
    // Two teams, but where their blocks would be few.
    const int64_t units = ceil_div(p.batch * segments, 2 * kTeamSegments) * ceil_div(groups, 4);
    return with(4, units < 128 ? 1 : 2);
  }
  if (is_whole) return with(groups, groups >= 7 ? 2 : 4);
  if (groups <= 4) return with(4, 4);
  if (groups > kMostWhole && groups < most_warps(3) && groups % kBoxGroups != 0)
    return with(ceil_div(groups, kBoxGroups) * kBoxGroups, 1);
  return with(kBoxGroups, segments > kTeamSegments ? 2 : 1);
}

// Blocks that a multiprocessor has at once.
int resident_blocks(const Cut& cut, const Device& device) {
  constexpr int kBlockBytes = 1024;  // of shared memory that the system takes
  const int by_registers = kRegisters / (registers(cut.kernel) * cut.threads());
  return std::min(by_registers,
                  device.shared_per_multiprocessor / (cut.shared_bytes() + kBlockBytes));
}

}  // namespace

Cut choose_cut(const GradientParams& p, const Device& device) {
  Cut cut{};
  cut.kernel = static_cast<int>(p.kernel_h), cut.stride = static_cast<int>(p.stride_h);
  cut.stage_rows = 1;
  const int64_t all = ceil_div(p.out_w, kSegment);
  choose_warps(cut, p, all);
  for (;; --cut.teams) {
    // Segments of columns, then of images.
    const int64_t tiles = ceil_div(all, cut.teams * kTeamSegments);
    cut.segments = static_cast<int>(ceil_div(all, tiles));
    const int64_t images = tiles == 1 ? cut.teams * kTeamSegments / cut.segments : 1;
    cut.images = static_cast<int>(std::clamp<int64_t>(images, 1, p.batch));
    const bool fits =
        cut.input_columns() <= kMostBoxElements && cut.shared_bytes() <= device.shared_per_block;
    if (fits || cut.teams == 1) break;
  }
  cut.teams = static_cast<int>(ceil_div(cut.segments * cut.images, kTeamSegments));
  // Blocks of few warps share a multiprocessor.
  const int most_bytes = (cut.threads() <= 256 ? 20 : 70) * 1024;
  while (cut.stage_rows < kMostStageRows) {
    ++cut.stage_rows;
    if (cut.stage_bytes() <= most_bytes && cut.shared_bytes() <= device.shared_per_block) continue;
    --cut.stage_rows;
    break;
  }
  Walks walks{};
  walks.columns = ceil_div(all, cut.segments) * ceil_div(p.batch, cut.images);
  walks.height = p.out_h;
  walks.more_rows = seen_rows(cut.kernel, cut.stride) - 1;
  walks.walkers = 1;
  walks.blocks = ceil_div(p.channels, cut.groups * kGroup);
  walks.resident = int64_t{device.multiprocessors} * std::max(1, resident_blocks(cut, device));
  walks.reduction = 6;
  walks.enough_blocks = cut.boxes() > 1 ? 100 : 75;
  cut.split = choose_split(walks);
  return cut;
}

}  // namespace diagonal_sums
}  // namespace dwswap
