// How the first layer of a network is cut into units, one for each block.
#pragma once

#include <cstdint>

#include "common/integer.h"
#include "stem_conv2d/params.h"

namespace dwswap {
namespace stem {

constexpr int kTile = 16;      // pixels of output, a row of them: the M of the matrix instruction
constexpr int kMostTiles = 8;  // of a unit, side by side
constexpr int kMostRows = 4;   // of output of a unit
constexpr int kWarps = 4;
constexpr int kMostChannels = 64;  // of the output

struct Cut {
  int rows, tiles;
  int64_t groups, pieces;  // of rows of an image, of tiles of a row
  int64_t units;
};

// Rows of input between two units are read twice, so units are tall; but all multiprocessors get
// some, two of them where there are enough. The last way to have more is a tile for each warp.
inline Cut choose_cut(const StemConv2dParams& p, int multiprocessors) {
  const int64_t all = ceil_div(p.out_w(), kTile);
  const auto cut_of = [&](int rows, int64_t pieces) {
    Cut cut{};
    cut.rows = rows, cut.tiles = static_cast<int>(ceil_div(all, pieces));
    cut.groups = ceil_div(p.out_h(), rows), cut.pieces = ceil_div(all, cut.tiles);
    cut.units = p.batch * cut.groups * cut.pieces;
    return cut;
  };
  const int64_t pieces = ceil_div(all, kMostTiles), wanted = 2 * multiprocessors;
  Cut cut = cut_of(kMostRows, pieces);
  for (int rows = kMostRows / 2; rows > 0 && cut.units < wanted; rows /= 2)
    cut = cut_of(rows, pieces);
  if (cut.units < wanted) cut = cut_of(1, ceil_div(all, kWarps));
  return cut;
}

}  // namespace stem
}  // namespace dwswap
