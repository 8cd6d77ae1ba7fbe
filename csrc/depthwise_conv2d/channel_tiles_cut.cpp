#include "depthwise_conv2d/channel_tiles_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "common/integer.h"
#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace channel_tiles {

DepthwiseConv2dParams lattice_of(const DepthwiseConv2dParams& p) {
  DepthwiseConv2dParams lattice = p;
  lattice.batch *= p.dilation_h * p.dilation_w;
  lattice.in_h = ceil_div(p.in_h, p.dilation_h), lattice.in_w = ceil_div(p.in_w, p.dilation_w);
  lattice.out_h = ceil_div(p.out_h, p.dilation_h), lattice.out_w = ceil_div(p.out_w, p.dilation_w);
  lattice.dilation_h = lattice.dilation_w = 1;
  return lattice;
}

Depth choose_depth(const DepthwiseConv2dParams& p, int multiprocessors) {
  // Threads of the deep kernel that keep a multiprocessor busy, and their outputs.
  constexpr int64_t kThreads = 256, kRows = 4, kOutputs = kColumns * kRows * 2;
  if (p.is_dilated() && lattice_of(p).out_h < kRows) return Depth::kFlat;
  return p.batch * p.channels * p.out_h * p.out_w / kOutputs < kThreads * multiprocessors
             ? Depth::kFlat
             : Depth::kDeep;
}

namespace {

// How a thread computes, and how a tile is read.
struct Kernel {
  Reader reader;
  int columns, rows;  // of output, of a thread
  int element_bytes;
};

// Pieces of so many bytes that a run of channels touches, on average over the places where runs
// begin: multiples of `run_bytes`, and of `pitch` from pixel to pixel.
double touched(int piece, int run_bytes, int64_t pitch) {
  const int64_t grid = std::gcd(std::gcd<int64_t>(piece, run_bytes), pitch);
  return 1.0 + static_cast<double>(run_bytes - grid) / piece;
}

// Of an image along an axis: neighbouring tiles read what they share twice.
double read_along(int64_t in, int64_t tiles, int tile, int shared) {
  return static_cast<double>(std::min(in + (tiles - 1) * shared, tiles * tile));
}

// What a block reads: a tile of the input, and the taps.
struct Extent {
  int width, height;
  int run_bytes;  // of a pixel
  int bytes;      // of shared memory
};
Extent extent_of(const DepthwiseConv2dParams& p, const Tile& tile, const Kernel& k) {
  const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  Extent e{};
  e.width = (tile.groups_w * k.columns - 1) * stride + kernel;
  e.height = (tile.groups_h * k.rows - 1) * stride + kernel;
  e.run_bytes = 2 * tile.pairs * k.element_bytes;
  e.bytes = e.run_bytes * (e.width * e.height + kernel * kernel);
  return e;
}

// Time in clocks of a multiprocessor: what moves and what is computed hide each other in part. The
// constants fit 5200 times of float32 on an H200 (64 images; benchmarks/NOTES.md).
double expected_clocks(const DepthwiseConv2dParams& p, const Tile& tile, const Extent& extent,
                       const Kernel& k, int multiprocessors) {
  constexpr int kSharedBytes = 233472, kBlockBytes = 1152;  // a block takes more than its tile
  constexpr int kResidentWarps = 16;                        // by their registers
  constexpr int kQuarters = 4;                              // each issues for its own warps
  constexpr int kLine = 128, kPiece = 64;                   // bytes: of caches, of memory
  constexpr double kCopyBytes = 16.0;                       // per clock, of a copy
  constexpr double kLineClocks = 1.5;                       // of a line that is read
  constexpr double kPieceClocks = 0.75;                     // of a piece that is read or written
  constexpr double kFillClocks = 2.0;                       // of a line of a block's tile
  constexpr double kStraddleClocks = 4.0;         // of the copy engine, for a line more of a pixel
  constexpr double kAsyncClocks = 22.0;           // of a warp's copy, without the copy engine
  constexpr double kIssue = 2.0, kSetup = 330.0;  // of a multiply-add of a warp, and of a warp
  const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  const int run = extent.run_bytes, pixels = extent.width * extent.height;
  const int64_t pitch = p.channels * k.element_bytes;
  const int64_t slices = ceil_div(p.channels / 2, tile.pairs);
  const int64_t tiles_w = ceil_div(ceil_div(p.out_w, k.columns), tile.groups_w);
  const int64_t tiles_h = ceil_div(ceil_div(p.out_h, k.rows), tile.groups_h);
  const auto warps = static_cast<int>(ceil_div(tile.threads(), 32));
  // Of a multiprocessor.
  const double images = static_cast<double>(p.batch) / multiprocessors;
  const double blocks = static_cast<double>(slices * tiles_w * tiles_h) * images;
  const int resident =
      std::max(1, std::min(kSharedBytes / (extent.bytes + kBlockBytes), kResidentWarps / warps));

  const double pieces = kPieceClocks * touched(kPiece, run, pitch);
  const double lines = kLineClocks * touched(kLine, run, pitch);
  // In shared memory runs lie behind each other. Those of 96 bytes straddle lines, and take the
  // copy engine longer than those of 64.
  const double tile_lines = touched(kLine, run, run);
  const double read = read_along(p.in_w, tiles_w, extent.width, kernel - stride) *
                      read_along(p.in_h, tiles_h, extent.height, kernel - stride);
  const auto outputs = static_cast<double>(p.out_h * p.out_w);
  const double copy =
      static_cast<double>(pitch) * (static_cast<double>(p.in_h * p.in_w) + outputs) / kCopyBytes;
  const double moved =
      images * (copy + static_cast<double>(slices) * (read * (lines + pieces) + outputs * pieces)) +
      blocks * pixels * tile_lines * kFillClocks / resident;

  const double straddles = tile_lines - static_cast<double>(ceil_div(run, kLine));
  const double of_a_pixel = k.reader.bulk ? kStraddleClocks * straddles
                                          : kAsyncClocks * run / (32.0 * k.reader.vector_bytes);
  const double of_a_warp = (kIssue * 2 * k.columns * k.rows * kernel * kernel + kSetup) / kQuarters;
  const double most_blocks = std::ceil(blocks);
  const double computed = std::max(most_blocks * warps, 1.0 * kQuarters) * of_a_warp +
                          most_blocks * pixels * of_a_pixel;
  // With fewer blocks than multiprocessors, those that have one cannot use all of the bandwidth.
  const double starved = blocks < 1.0 ? 2.0 - blocks : 1.0;
  return std::hypot(moved, computed) * starved;
}

Tile search_tile(const DepthwiseConv2dParams& p, const Kernel& k, int multiprocessors) {
  constexpr int kTileBytes = 40960;  // several blocks share a multiprocessor
  const int step = k.reader.vector_bytes / k.element_bytes / 2;
  const auto wide = static_cast<int>(ceil_div(p.out_w, k.columns));
  const auto high = static_cast<int>(ceil_div(p.out_h, k.rows));
  const auto all_pairs = static_cast<int>(p.channels / 2);
  Search<Tile> search;
  for (const int wish : {4, 8, 12, 16, 24, 32, 48, 64}) {
    const int pairs = std::min(static_cast<int>(ceil_div(wish, step)) * step, all_pairs);
    const int most_w = std::min({wide, kMostGroups, kMaxThreads / pairs});
    for (int groups_w = 1; groups_w <= most_w; ++groups_w) {
      const int most_h = std::min({high, kMostGroups, kMaxThreads / (pairs * groups_w)});
      for (int groups_h = 1; groups_h <= most_h; ++groups_h) {
        const Tile tile{pairs, groups_w, groups_h};
        const Extent extent = extent_of(p, tile, k);
        if (std::max(extent.width, extent.height) > kMostBoxElements || extent.bytes > kTileBytes)
          continue;
        search.consider(expected_clocks(p, tile, extent, k, multiprocessors), tile);
      }
    }
  }
  return search.best();
}

}  // namespace

Tile choose_tile(const DepthwiseConv2dParams& p, const Reader& reader, int columns, int rows,
                 int element_bytes, int multiprocessors) {
  const std::array<int64_t, 14> key{p.batch,     p.channels,     p.in_h,        p.in_w,
                                    p.out_h,     p.out_w,        p.kernel_h,    p.stride_h,
                                    columns,     rows,           element_bytes, reader.vector_bytes,
                                    reader.bulk, multiprocessors};
  return memoized(
      key, [&] { return search_tile(p, {reader, columns, rows, element_bytes}, multiprocessors); });
}

}  // namespace channel_tiles
}  // namespace dwswap
