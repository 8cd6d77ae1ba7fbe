// How a depthwise and a pointwise convolution are cut into blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integer.h"
#include "separable_conv2d/params.h"

namespace dwswap {
namespace separable {

constexpr int kWarps = 8;            // of a block
constexpr int kRows = 16;            // outputs of a matrix instruction
constexpr int kColumns = 8;          // pixels of one
constexpr int kStep = 32;            // channels, of two matrix instructions; 64 bytes
constexpr int kPair = 2;             // pixels of a thread, side by side
constexpr int kMostChannels = 2048;  // of a slice, padded: a vector of 8 for each thread
constexpr int kMostSlices = 8;       // blocks of a cluster on every GPU that has clusters

// What follows from the pixels of a block and the number of slices.
struct Cut {
  int pixels, channels, slices;  // of a block, the last two of its cluster
  int64_t tiles;                 // of pixels

  // Channels of a row in shared memory, with what fills it up to the matrix instructions' and what
  // lies between rows: of an odd number of 64 bytes, 8 lanes with 16 bytes each of two neighbouring
  // rows read from all banks.
  int padded() const { return static_cast<int>(ceil_div(channels, kStep)) * kStep; }
  int pitch() const { return padded() % (2 * kStep) == 0 ? padded() + kStep : padded(); }
  // Products of kRows x kColumns that a block adds to. Of each, a block of the cluster has the sum
  // of all; where they are fewer than warps, several have parts of the channels.
  int units(int64_t outputs) const {
    return static_cast<int>(ceil_div(outputs, kRows)) * (pixels / kColumns);
  }
  int parts(int64_t outputs) const {
    return std::clamp(kWarps / units(outputs), 1, padded() / kStep);
  }
  int share(int64_t outputs) const { return static_cast<int>(ceil_div(units(outputs), slices)); }
  // Of dynamic shared memory.
  int64_t bytes(int64_t outputs, int64_t taps) const {
    constexpr int64_t kUnitBytes = 4 * kRows * kColumns;
    return 2 * (channels * taps + (outputs + pixels) * pitch()) +
           kUnitBytes * slices * parts(outputs) * share(outputs);
  }
};

// Of pixels of a row; the last one of an odd row is alone.
inline int64_t pairs_of(const SeparableConv2dParams& p) {
  return p.depthwise.batch * p.depthwise.out_h * ceil_div(p.depthwise.out_w, kPair);
}

inline Cut cut_of(const SeparableConv2dParams& p) {
  Cut cut{};
  cut.pixels = p.pixels;
  cut.channels = static_cast<int>(ceil_div(p.depthwise.channels, 8 * p.slices)) * 8;
  // Fewer where rounded shares leave nothing for the last.
  cut.slices = static_cast<int>(ceil_div(p.depthwise.channels, cut.channels));
  cut.tiles = ceil_div(pairs_of(p) * kPair, p.pixels);
  return cut;
}

}  // namespace separable
}  // namespace dwswap
