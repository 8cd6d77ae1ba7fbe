// How the kernels of batch normalization cut a batch into blocks.
#pragma once

#include <algorithm>

#include "batch_norm/params.h"
#include "common/integer.h"
#include "common/lanes.h"

namespace dwswap {
namespace batch_norm {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors of a thread that are under way
// Positions and columns, and a grid's step past the last of them, are counted in 32 bits.
constexpr int64_t kMostPositions = int64_t{1} << 30;

// A batch is either a matrix, whose columns have one channel each: pixels by channels in
// channels_last, and images by pixels of all channels where planes are small. Or it is the planes
// of one channel after another. A block has `lanes` threads along the columns and `rows` of them
// along positions: rows of the matrix, or vectors of the planes of its channel.
struct Cut {
  bool matrix;
  int vector;  // elements of an access
  int64_t columns;
  int columns_of_channel;
  int lanes, rows;
  int chunks;  // blocks along the columns, or channels
  int splits;  // blocks along the positions
  int64_t positions;

  // Two sums for each column of each split.
  int64_t partials() const { return 2 * int64_t{splits} * columns; }
};

inline Cut choose_cut(const BatchNormParams& p, int multiprocessors) {
  constexpr int kBlocks = 3;  // of a multiprocessor, resident at once
  constexpr int kWaves = 4;   // of blocks whose channels have few positions
  constexpr int kSmallPlane = 256;
  const int element_bytes = bytes_of(p.dtype);
  const int wide = kVectorBytes / element_bytes;
  const bool last = p.layout == Layout::kChannelsLast;
  const auto places = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.output) |
                      reinterpret_cast<uintptr_t>(p.output_gradient);
  const auto fits = [&](int vector, int64_t width) {
    return width % vector == 0 && places % (vector * element_bytes) == 0;
  };
  const int64_t sample = int64_t{p.channels} * p.pixels;
  const bool flat = !last && p.pixels >= wide && p.pixels <= kSmallPlane &&
                    sample <= kMostPositions && !fits(wide, p.pixels) && fits(wide, sample);
  Cut cut{};
  cut.matrix = last || flat;
  cut.columns_of_channel = flat ? p.pixels : 1;
  cut.columns = int64_t{p.channels} * cut.columns_of_channel;
  const int64_t width = cut.matrix ? cut.columns : p.pixels;
  cut.vector = fits(wide, width) ? wide : fits(wide / 2, width) ? wide / 2 : 1;
  if (cut.matrix) {
    const int64_t vectors = width / cut.vector;
    cut.lanes = choose_lanes(vectors, cut.vector * element_bytes, kThreads);
    cut.chunks = static_cast<int>(ceil_div(vectors, cut.lanes));
    cut.positions = int64_t{p.batch} * (flat ? 1 : p.pixels);
  } else {
    cut.lanes = 1, cut.chunks = p.channels;
    cut.positions = int64_t{p.batch} * (p.pixels / cut.vector);
  }
  cut.rows = kThreads / cut.lanes;
  const int64_t blocks = int64_t{multiprocessors} * kBlocks * (cut.matrix ? 1 : kWaves);
  const int64_t most = ceil_div(cut.positions, int64_t{cut.rows} * kUnroll);
  cut.splits = static_cast<int>(
      std::clamp<int64_t>(ceil_div(blocks, cut.chunks), 1, std::max<int64_t>(most, 1)));
  return cut;
}

}  // namespace batch_norm
}  // namespace dwswap
