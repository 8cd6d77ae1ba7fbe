// How diagonal cuts a problem into units and blocks.
#pragma once

#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace diagonal {

constexpr int kGroup = 8;           // channels of one product
constexpr int kProductPixels = 16;  // of output
constexpr int kUnitChannels = 32;   // of a block
constexpr int kGroups = kUnitChannels / kGroup;
constexpr int kMostTeams = 4;  // of warps with all the channels: a multiprocessor has so many
constexpr int kSlots = 2;      // stages of input in shared memory
constexpr int kPixelBytes = 2 * kUnitChannels;
constexpr int kAlignment = 1024;  // of shared memory, in bytes: a multiple of a swizzle's period

// Products side by side that a warp has: they share the taps, and hide each other's latency. The
// taps of K = 7 leave registers for one.
constexpr int products_of_warp(int kernel) { return kernel == 7 ? 1 : 2; }
constexpr int team_pixels(int kernel) { return kProductPixels * products_of_warp(kernel); }

// Rows of output that a thread adds up at once, and rows of input of a stage: the place of a row of
// output among the sums is then known at compile time.
constexpr int ring_rows(int kernel, int stride) { return (kernel - 1) / stride + 1; }
constexpr int stage_rows(int kernel, int stride) { return ring_rows(kernel, stride) * stride; }

// Pixels of a row of input in shared memory. Rows begin at lines of it, so that the copy engine's
// swizzle, which depends on the line, has its places at the same pixels of every row but for a
// shift.
constexpr int kLinePixels = 2, kPeriod = 4;  // lines after which the swizzle is the same
constexpr int tile_columns(int columns, int kernel, int stride) {
  return static_cast<int>(ceil_div((columns - 1) * stride + kernel, kLinePixels) * kLinePixels);
}
// By how many lines of a period a row is further on than the one before.
constexpr int row_shift(int tile_columns) { return tile_columns / kLinePixels % kPeriod; }

constexpr int align(int bytes) {
  return static_cast<int>(ceil_div(bytes, kAlignment) * kAlignment);
}

// A unit: so many columns of so many images, and rows of output.
struct Cut {
  int teams;  // of a block, each for pixels of its own
  int columns, images, rows;
  int stages;                // of a unit
  int units, chunks, parts;  // of an image's channels and of its units: a block has one of each

  int stage_bytes(int kernel, int stride) const {
    return align(images * stage_rows(kernel, stride) * tile_columns(columns, kernel, stride) *
                 kPixelBytes);
  }
  int row_bytes(int kernel) const {  // of output
    return align(teams * team_pixels(kernel) * kPixelBytes);
  }
  int threads() const { return 32 * kGroups * teams; }
  int shared_bytes(int kernel, int stride) const {
    return kSlots * (stage_bytes(kernel, stride) + static_cast<int>(sizeof(uint64_t))) +
           2 * ring_rows(kernel, stride) * row_bytes(kernel);
  }
};

Cut choose_cut(const DepthwiseConv2dParams& params, const Device& device);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, const Device& device,
                         cudaStream_t stream);

}  // namespace diagonal
}  // namespace dwswap
