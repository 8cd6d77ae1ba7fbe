// How the kernels that scale channels cut images into blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "channel_scale/params.h"
#include "common/integer.h"
#include "common/lanes.h"

namespace dwswap {
namespace channel_scale {

constexpr int kThreads = 256;
// Vectors of a thread that are under way: 64 bytes of each tensor where a vector has 16.
template <int V>
constexpr int kUnroll = V == 1 ? 8 : 4;
inline int unroll_of(int vector) { return vector == 1 ? kUnroll<1> : kUnroll<2>; }

// Images in channels_last, or planes, each in `splits` parts of `span` positions: pixels, or
// vectors of a plane. A part is shared by `rows` threads along its positions and, in channels_last,
// `lanes` threads along the channels, of which an image has `chunks` times as many. A block has
// `groups` of such threads.
struct Cut {
  int vector;  // elements of an access
  int lanes, rows, groups;
  int chunks, splits;
  int positions, span;
  int64_t units;  // groups of all blocks that have something to do

  int64_t blocks() const { return ceil_div(units, groups); }
};

// Elements of an access, of 16 bytes where all rows of `width` elements begin at multiples of
// those.
inline int choose_vector(const ChannelScaleParams& p, int64_t width) {
  const int element_bytes = bytes_of(p.dtype);
  const int wide = kVectorBytes / element_bytes;
  uintptr_t places = 0;
  for (const void* pointer : {p.input, p.output_gradient, static_cast<const void*>(p.output)})
    places |= reinterpret_cast<uintptr_t>(pointer);
  if (p.layout == Layout::kChannelsLast)  // a vector of channels has one of gates
    places |= reinterpret_cast<uintptr_t>(p.gates) | reinterpret_cast<uintptr_t>(p.spread);
  const auto fits = [&](int vector) {
    return width % vector == 0 && places % (vector * element_bytes) == 0;
  };
  return fits(wide) ? wide : fits(wide / 2) ? wide / 2 : 1;
}

// `blocks`: how many are wanted for each multiprocessor. `most`: vectors of a thread beyond which
// there are more blocks than that; 0 for no such limit.
inline Cut choose_cut(const ChannelScaleParams& p, int multiprocessors, int blocks, int most) {
  const int element_bytes = bytes_of(p.dtype);
  const bool last = p.layout == Layout::kChannelsLast;
  Cut cut{};
  cut.vector = choose_vector(p, last ? p.channels : p.pixels);
  cut.lanes = cut.chunks = 1;
  cut.positions = p.pixels;
  if (last) {
    const int64_t vectors = p.channels / cut.vector;
    cut.lanes = choose_lanes(vectors, cut.vector * element_bytes, kThreads);
    cut.chunks = static_cast<int>(ceil_div(vectors, cut.lanes));
  } else {
    cut.positions /= cut.vector;
  }
  const int unroll = unroll_of(cut.vector);
  const auto loads = static_cast<int>(ceil_div(cut.positions, unroll));
  cut.rows = std::min(kThreads / cut.lanes, loads);
  cut.groups = kThreads / (cut.lanes * cut.rows);
  const int64_t outer = int64_t{p.batch} * (last ? cut.chunks : p.channels);
  const int64_t wanted = ceil_div(int64_t{multiprocessors} * blocks * cut.groups, outer);
  const int64_t least = most == 0 ? 1 : ceil_div(cut.positions, int64_t{cut.rows} * most);
  const int64_t limit = ceil_div(cut.positions, int64_t{cut.rows} * unroll);
  const int64_t splits = std::clamp<int64_t>(std::max(wanted, least), 1, limit);
  cut.span = static_cast<int>(ceil_div(cut.positions, splits));
  cut.splits = static_cast<int>(ceil_div(cut.positions, cut.span));
  cut.units = outer * cut.splits;
  return cut;
}

// Of y: a thread computes its gates once for at most so many vectors.
inline Cut scale_cut(const ChannelScaleParams& p, int multiprocessors) {
  constexpr int kBlocks = 16, kMost = 8;
  return choose_cut(p, multiprocessors, kBlocks, kMost);
}

// Of the gradients of the gates: each part has sums to be added up once more, so there are only so
// many that the last wave of blocks is short.
inline Cut sums_cut(const ChannelScaleParams& p, int multiprocessors) {
  constexpr int kBlocks = 12;
  return choose_cut(p, multiprocessors, kBlocks, 0);
}

}  // namespace channel_scale
}  // namespace dwswap
