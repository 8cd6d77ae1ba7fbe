#include "depthwise_conv2d/plane_bands_cut.h"

#include <array>
#include <cmath>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/problem_key.h"

namespace dwswap {
namespace plane_bands {
namespace {

constexpr int64_t kElementBytes = 2;

// Accesses to shared memory that one access of a warp becomes: 8 walks of 4 neighbouring words.
int bank_conflicts(const Cut& cut, int pitch, int64_t segment_bytes) {
  constexpr int kBanks = 32, kBankBytes = 4, kLanesOfWalk = 4;
  int most = 1;
  for (int half = 0; half < kWalks; half += kWalks / 2) {
    std::array<int, kBanks> count{};
    for (int walk = half; walk < half + kWalks / 2; ++walk) {
      const int64_t word =
          (walk / cut.segments * int64_t{pitch} + walk % cut.segments * segment_bytes) / kBankBytes;
      for (int i = 0; i < kLanesOfWalk; ++i) most = std::max(most, ++count[(word + i) % kBanks]);
    }
  }
  return most;
}

// The pitch of pieces of so many bytes that has the fewest conflicts.
int choose_pitch(const Cut& cut, int64_t piece_bytes, int64_t segment_bytes) {
  // A piece begins anywhere within a vector and is copied up to the end of one.
  const auto least = static_cast<int>((ceil_div(piece_bytes, kVectorBytes) + 1) * kVectorBytes);
  int best = least, fewest = kWalks * 4;
  for (int extra = 0; extra < 128; extra += kVectorBytes) {
    const int conflicts = bank_conflicts(cut, least + extra, segment_bytes);
    if (conflicts < fewest) fewest = conflicts, best = least + extra;
  }
  return best;
}

// Time in clocks of a multiprocessor, up to a constant. Fitted to some 300 measurements on an H200
// of 64 images: its choice is within 4 % of the best of each of 15 problems.
double estimate(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device) {
  constexpr double kRowInstructions = 39.0;  // of a warp, around one row of input
  constexpr double kRowClocks = 155.0;       // from its loads to its stores
  constexpr double kTileInstructions = 80.0, kTileClocks = 330.0;  // before its first row
  constexpr double kInstructionsPerClock = 1.84;
  constexpr double kStartClocks = 10700.0;  // of the launch, until all blocks have their first unit
  constexpr double kUnitClocks = 790.0;     // to wait for the other warps
  constexpr double kImageClocks = 66.0;     // to start the copies of an image
  constexpr double kRaggedClocks = 130.0;   // to write one that does not begin at a vector
  constexpr double kBlockBytes = 1024.0;    // of shared memory, that every block takes
  constexpr int64_t kVectorElements = kVectorBytes / kElementBytes;
  const auto stride = static_cast<int>(p.stride_h), kernel = static_cast<int>(p.kernel_h);
  const double tiles = static_cast<double>(ceil_div(p.out_w, kTile));
  const double turns = std::ceil(cut.planes * tiles / cut.warps);
  const bool skips = cut.segments == 1 && cut.rows == p.out_h;
  // Above the image, and with stride 1 below it.
  const int64_t skipped = !skips        ? 0
                          : stride == 1 ? 2 * p.padding_h
                                        : p.padding_h / stride * stride;
  const int ring = ring_rows(kernel, stride);
  const auto steps = static_cast<double>(
      ceil_div((cut.segment_rows - 1) * stride + kernel - skipped, ring) * ring);
  const double units = static_cast<double>(ceil_div(p.batch, cut.images)) *
                       static_cast<double>(ceil_div(p.channels, cut.planes)) *
                       static_cast<double>(ceil_div(p.out_h, cut.rows));
  const double resident =
      std::max(1.0, std::floor(std::min(static_cast<double>(kMaxWarps * kMinBlocks) / cut.warps,
                                        device.shared_per_multiprocessor /
                                            (cut.shared_bytes() + kStaticBytes + kBlockBytes))));
  const double blocks = std::min(units, resident * device.multiprocessors);
  const double share = std::ceil(units / blocks);
  const double together = std::ceil(blocks / device.multiprocessors);
  const bool ragged = cut.planes * cut.rows * p.out_w % kVectorElements != 0 ||
                      p.channels * p.out_h * p.out_w % kVectorElements != 0 ||
                      (cut.planes == 1 && p.out_h * p.out_w % kVectorElements != 0);
  const double ragged_images = ragged ? cut.images : 0.0;
  const double chain =
      kStartClocks + share * (kUnitClocks + kImageClocks * cut.images +
                              kRaggedClocks * std::ceil(ragged_images / cut.warps) +
                              turns * (steps * kRowClocks + kTileClocks));
  const double instructions = cut.planes * tiles * (steps * kRowInstructions + kTileInstructions) +
                              kRaggedClocks * ragged_images / 2.0;
  const double issue = share * together * instructions / kInstructionsPerClock;
  return std::sqrt(chain * chain + issue * issue);
}

Cut search_cut(const DepthwiseConv2dParams& p, const Device& device) {
  const int64_t tiles = ceil_div(p.out_w, kTile);
  Search<Cut> search;
  const auto consider = [&](Cut cut) {
    cut.segments = kWalks / cut.images;
    cut.segment_rows = ceil_div(cut.rows, cut.segments);
    // All walks of a product begin their rows at even elements, or all at odd ones.
    const bool odd = p.in_w * p.stride_h % 2 != 0 || p.out_w % 2 != 0;
    if (cut.segments > 1 && odd) cut.segment_rows = ceil_div(cut.segment_rows, 2) * 2;
    const int64_t tasks = cut.planes * tiles;
    cut.warps = static_cast<int>(ceil_div(tasks, ceil_div(tasks, kMaxWarps)));
    const int64_t in_row = p.in_w * kElementBytes, out_row = p.out_w * kElementBytes;
    const int64_t in_bytes = cut.planes * unit_in_rows(p, cut.rows) * in_row;
    const int64_t out_bytes = cut.planes * cut.rows * out_row;
    if (std::max(in_bytes, out_bytes) > device.shared_per_block) return;
    cut.in_pitch = choose_pitch(cut, in_bytes, cut.segment_rows * p.stride_h * in_row);
    cut.out_pitch = choose_pitch(cut, out_bytes, cut.segment_rows * out_row);
    if (cut.shared_bytes() + kStaticBytes > device.shared_per_block) return;
    search.consider(estimate(p, cut, device), cut);
  };
  for (const int images : {1, 2, 4, 8, 16}) {
    if (images >= 2 * p.batch) break;
    int last = 0;
    // Finer steps change little where there are many.
    for (int64_t strips = 1; strips <= p.out_h; strips += 1 + strips / 32) {
      const auto rows = static_cast<int>(ceil_div(p.out_h, strips));
      if (rows != last) consider({images, 0, 1, rows});
      last = rows;
    }
    for (int planes = 2; planes <= std::min<int64_t>(p.channels, 32); ++planes)
      consider({images, 0, planes, static_cast<int>(p.out_h)});
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, const Device& device) {
  return memoized(problem_key(p, device), [&] { return search_cut(p, device); });
}

}  // namespace plane_bands
}  // namespace dwswap
