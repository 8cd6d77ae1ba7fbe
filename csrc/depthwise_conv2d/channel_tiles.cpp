#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/data_type.h"
#include "common/device.h"
#include "common/integer.h"
#include "common/memo.h"
#include "depthwise_conv2d/channel_tiles_cut.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace {

// Of pixels: with a dilation like this the largest tile is still a box.
constexpr int kMostBoxStep = 4;
constexpr int kMostTile =
    channel_tiles::kMostGroups * channel_tiles::kColumns - 1 + channel_tiles::kMostKernel;
static_assert(Box::extent(kMostTile, kMostBoxStep) <= kMostBoxElements);

int element_bytes(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

channel_tiles::Reader choose_reader(const DepthwiseConv2dParams& p, const Device& device) {
  const auto pixel = static_cast<uint64_t>(p.channels) * element_bytes(p.dtype);
  const auto alignment =
      reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.input_bias) | pixel;
  const int bytes = alignment % 16 == 0 ? 16 : alignment % 8 == 0 ? 8 : 4;
  const bool bulk = reads_boxes(device) && readable_in_boxes(p, element_bytes(p.dtype)) &&
                    std::max(p.dilation_h, p.dilation_w) <= kMostBoxStep;
  return {bulk, bytes};
}

}  // namespace

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

static Tile search_tile(const DepthwiseConv2dParams& p, const Reader& reader, int columns, int rows,
                        int element_bytes, int multiprocessors) {
  constexpr int kThreads = 128;         // per block, where the image is large enough
  constexpr int kTileBytes = 40960;     // several blocks per SM
  constexpr int kSector = 32;           // bytes that L2 moves at least
  constexpr double kIssueSlots = 14.0;  // per byte of input at the bandwidth of a copy
  const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  const int step = reader.vector_bytes / element_bytes / 2;
  const auto wide = static_cast<int>(ceil_div(p.out_w, columns));
  const auto high = static_cast<int>(ceil_div(p.out_h, rows));
  const auto all_pairs = static_cast<int>(p.channels / 2);
  // Time in units of a copy: of the arithmetic, and of what goes through L2.
  const double arithmetic =
      (9.0 + 2.0 * kernel * kernel) / (kIssueSlots * element_bytes * (1.0 + stride * stride));
  const double in_share = stride * stride / (1.0 + stride * stride);
  Tile best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (const int wish : {4, 8, 12, 16, 24, 32, 48, 64}) {
    const int pairs = std::min(static_cast<int>(ceil_div(wish, step)) * step, all_pairs);
    const auto slices = ceil_div(all_pairs, pairs);
    const int bytes = 2 * pairs * element_bytes;
    // Short runs of channels are slow to copy, and those that end within a sector move more.
    const double runs = 1.0 + 24.0 / bytes;
    const bool whole = slices == 1 || bytes % kSector == 0;
    const double sectors = whole ? runs : runs + static_cast<double>(kSector) / bytes;
    for (int groups_w = 1; groups_w <= std::min({wide, kMostGroups, kMaxThreads / pairs});
         ++groups_w) {
      for (int groups_h = 1;
           groups_h <= std::min({high, kMostGroups, kMaxThreads / (pairs * groups_w)});
           ++groups_h) {
        const int tile_w = (groups_w * columns - 1) * stride + kernel;
        const int tile_h = (groups_h * rows - 1) * stride + kernel;
        if (tile_w > kMostBoxElements || tile_h > kMostBoxElements ||
            bytes * (tile_w * tile_h + kernel * kernel) > kTileBytes)
          continue;
        const int threads = pairs * groups_w * groups_h;
        const double tiles =
            static_cast<double>(slices) * ceil_div(wide, groups_w) * ceil_div(high, groups_h);
        // Threads that are launched, idle ones included, over threads with work.
        const double idle =
            tiles * ceil_div(threads, 32) * 32 / (static_cast<double>(all_pairs) * wide * high);
        // Bytes that are copied over bytes of the image.
        const double copied = tiles * bytes * tile_w * tile_h * sectors /
                              (static_cast<double>(p.channels) * element_bytes * p.in_w * p.in_h);
        const double waves = tiles * p.batch / multiprocessors;
        const double starved = waves < 2.0 ? 2.0 - waves / 2.0 : 1.0;
        const double size = 1.0 + std::abs(threads - kThreads) / 1024.0;
        const double cost =
            (arithmetic * idle + in_share * copied + 1.0 - in_share) * size * starved;
        if (cost < best_cost) {
          best_cost = cost;
          best = {pairs, groups_w, groups_h};
        }
      }
    }
  }
  return best;
}

Tile choose_tile(const DepthwiseConv2dParams& p, const Reader& reader, int columns, int rows,
                 int element_bytes, int multiprocessors) {
  const std::array<int64_t, 13> key{p.batch,        p.channels, p.in_h,        p.in_w,
                                    p.out_h,        p.out_w,    p.kernel_h,    p.stride_h,
                                    columns,        rows,       element_bytes, reader.vector_bytes,
                                    multiprocessors};
  return memoized(
      key, [&] { return search_tile(p, reader, columns, rows, element_bytes, multiprocessors); });
}

}  // namespace channel_tiles

bool covers_channel_tiles(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kChannelsLast || p.out_layout != Layout::kChannelsLast) return false;
  if (p.multiplier != 1) return false;
  if (p.kernel_h != p.kernel_w || (p.kernel_h != 3 && p.kernel_h != 5 && p.kernel_h != 7))
    return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.is_dilated() && p.stride_h != 1) return false;
  if (p.dilation_h > p.out_h || p.dilation_w > p.out_w) return false;
  // A thread owns a pair of channels.
  const int pair_bytes = 2 * element_bytes(p.dtype);
  const auto addresses =
      reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.output) |
      reinterpret_cast<uintptr_t>(p.bias) | reinterpret_cast<uintptr_t>(p.input_bias);
  if (p.channels % 2 != 0 || addresses % pair_bytes != 0) return false;
  // At least 4 pairs of channels (or all), 7 columns and a row per block.
  const DepthwiseConv2dParams lattice = channel_tiles::lattice_of(p);
  const int64_t rows = lattice.batch * lattice.out_h;
  const int64_t tiles = ceil_div(lattice.out_w, channel_tiles::kColumns);
  if (p.channels > kLimit / 64 || rows > kLimit / (tiles * ceil_div(p.channels, 8))) return false;
  return p.in_h + 2 * p.padding_h <= kLimit / 2 && p.in_w + 2 * p.padding_w <= kLimit / 2;
}

cudaError_t launch_channel_tiles(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const Device device = current_device();
  const channel_tiles::Reader reader = choose_reader(p, device);
  return visit_fast_type(p.dtype, [&]<typename T>() {
    return channel_tiles::launch_typed<T>(p, reader, device.multiprocessors, stream);
  });
}

}  // namespace dwswap
