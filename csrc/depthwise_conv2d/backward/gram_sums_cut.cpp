#include "depthwise_conv2d/backward/gram_sums_cut.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "common/memo.h"
#include "depthwise_conv2d/problem_key.h"

namespace dwswap {
namespace gram_sums {
namespace {

constexpr int64_t kStageBytes = 18 * 1024;  // about
// Of low planes with few taps, so that three stages fit where two would.
constexpr int64_t kLowStageBytes = 13 * 1024;

int64_t align(int64_t bytes) { return ceil_div(bytes, kCopyBytes) * kCopyBytes; }

int piece_of(int64_t width) { return width % 4 == 0 ? 8 : 4; }

// Of rows with room for so many tiles of columns.
void set_places(Rows& rows, int64_t tiles, int parts) {
  rows.pitch = static_cast<int>((tiles / 2 * 2 + 1) * kTileBytes);
  rows.odd_rows = static_cast<int>(ceil_div(rows.count, parts)) * rows.pitch;
  rows.image_bytes = parts * rows.odd_rows;
}

// For so many rows of grad_output. A tile of it sees two tiles of the input's columns, or three
// where the stride is 2; the first ones of these may not be seen.
Rows input_rows(const GradientParams& p, int64_t count) {
  const int64_t seen = (kTile - 1) * p.stride_w + p.kernel_w;
  const int64_t most_unseen = (p.stride_w + 1) * kTile - seen;
  Rows rows{};
  rows.count = static_cast<int>((count - 1) * p.stride_h + p.kernel_h);
  const auto lead_of = [&](int64_t piece) { return ceil_div(p.padding_w, piece / 2) * piece / 2; };
  rows.piece = piece_of(p.in_w), rows.is_aligned = p.in_w % 2 == 0;
  if (lead_of(rows.piece) - p.padding_w > most_unseen) rows.piece = 4;
  const int64_t lead = lead_of(rows.piece);
  rows.lead = static_cast<int>(2 * lead);
  const int64_t tiles = p.stride_w * (ceil_div(p.out_w, kTile) + 1);
  set_places(rows, std::max(tiles, ceil_div(lead + p.in_w, kTile)), static_cast<int>(p.stride_h));
  return rows;
}

// With a tile of zeros on both sides.
Rows grad_rows(const GradientParams& p, int64_t count) {
  Rows rows{};
  rows.count = static_cast<int>(count);
  rows.piece = piece_of(p.out_w), rows.is_aligned = p.out_w % 2 == 0;
  rows.lead = kTileBytes;
  set_places(rows, ceil_div(p.out_w, kTile) + 2, 1);
  return rows;
}

void set_rows(Cut& cut, const GradientParams& p, int64_t count) {
  cut.input = input_rows(p, count), cut.grad = grad_rows(p, count);
}

// Strips of so many rows, whose planes are copied one by one from the 16 bytes in which they begin.
void cut_planes(Cut& cut, const GradientParams& p, int64_t rows) {
  cut.images = 1, cut.rows = static_cast<int>(rows);
  cut.strips = static_cast<int>(ceil_div(p.out_h, rows));
  const int64_t seen = std::min(p.in_h, (rows - 1) * p.stride_h + p.kernel_h);
  cut.input_bytes = align(seen * p.in_w * 2 + kCopyBytes);
  cut.grad_bytes = align(rows * p.out_w * 2 + kCopyBytes);
  set_rows(cut, p, rows);
}

void choose_stage(Cut& cut, const GradientParams& p) {
  constexpr int64_t kMostRows = 64;  // of whole planes
  cut.images = cut.strips = 1;
  cut.rows = static_cast<int>(p.out_h);
  cut.together = p.out_h <= kTile ? 2 : 1;
  cut.input_bytes = kChannels * p.in_h * p.in_w * 2;
  cut.grad_bytes = kChannels * p.out_h * p.out_w * 2;
  const int64_t image = cut.input_bytes + cut.grad_bytes;
  const int64_t step = kStepRows / cut.together;
  if (p.out_h <= kMostRows && image <= 3 * kStageBytes / 2) {
    const bool low = cut.together == 2 && p.kernel_h == 3 && p.stride_h == 1 &&
                     cut.together * image <= kLowStageBytes;
    const int64_t stage_bytes = low ? kLowStageBytes : kStageBytes;
    const int64_t images = std::min<int64_t>({kMostImages, p.batch, stage_bytes / image});
    cut.images = std::max(1, static_cast<int>(images) / cut.together * cut.together);
    set_rows(cut, p, ceil_div(p.out_h, step) * step);
    return;
  }
  for (int64_t rows = 4 * kStepRows; rows > kStepRows; rows -= kStepRows) {
    if (rows >= p.out_h) continue;
    cut_planes(cut, p, rows);
    if (cut.stage_bytes() <= kStageBytes) return;
  }
  if (p.out_h > kStepRows) {
    cut_planes(cut, p, kStepRows);
  } else {
    set_rows(cut, p, step);
  }
}

// A block takes as long for a stage when it has company, up to as many blocks as are resident. In
// the time of a stage.
int choose_shares(const Cut& cut, const GradientParams& p, int64_t resident) {
  constexpr double kStart = 0.7, kReduction = 1.2;
  const int64_t units = ceil_div(p.batch, cut.images) * cut.strips;
  const int64_t groups = p.channels / kChannels;
  int64_t best = 1;
  double best_time = std::numeric_limits<double>::infinity();
  for (int64_t most = 1;; most += most < 64 ? 1 : most / 32) {
    const int64_t shares = ceil_div(units, std::min(most, units));
    const int64_t rounds = ceil_div(units, shares);
    const double fill = static_cast<double>(shares * groups) / static_cast<double>(resident);
    const double waves = fill < 1.0 ? 1.0 : 0.5 * (fill + std::ceil(fill));
    const double time = waves * static_cast<double>(rounds) + std::ceil(fill) * kStart +
                        (shares == 1 ? 0.0 : kReduction);
    if (time < best_time) best_time = time, best = shares;
    if (shares == 1) return static_cast<int>(best);
  }
}

// Of a multiprocessor.
int64_t resident_blocks(const Cut& cut, const GradientParams& p, const Device& device) {
  constexpr int kBlockBytes = 1024;  // of shared memory, that the system takes
  if (cut.shared_bytes() > device.shared_per_block) return 0;
  const int64_t by_memory = device.shared_per_multiprocessor / (cut.shared_bytes() + kBlockBytes);
  return std::min<int64_t>(by_memory, most_blocks(static_cast<int>(p.kernel_h),
                                                  static_cast<int>(p.stride_h), p.wants_bias));
}

Cut search_cut(const GradientParams& p, const Device& device) {
  Cut cut{}, best{};
  choose_stage(cut, p);
  if (pieces_of(p.in_w, cut.input) * p.stride_w > 32 || pieces_of(p.out_w, cut.grad) > 32)
    return best;
  int64_t most = 0;
  for (cut.slots = 3; cut.slots >= 2; --cut.slots) {
    const int64_t blocks = resident_blocks(cut, p, device);
    if (blocks > most) most = blocks, best = cut;
  }
  if (most > 0) best.shares = choose_shares(best, p, most * device.multiprocessors);
  return best;
}

}  // namespace

Cut choose_cut(const GradientParams& p, const Device& device) {
  return memoized(std::pair(problem_key(p, device), p.wants_bias),
                  [&] { return search_cut(p, device); });
}

}  // namespace gram_sums
}  // namespace dwswap
