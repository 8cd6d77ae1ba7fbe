// How toeplitz cuts a problem into blocks and warps.
#pragma once

#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace toeplitz {

constexpr int kTile = 8;       // columns of output, or of input, of one matrix
constexpr int kStep = 16;      // columns of input that one product takes
constexpr int kTileRows = 16;  // rows of output of one product
constexpr int kGroup = 8;      // channels whose rows lie side by side in shared memory
constexpr int kMaxThreads = 256;

// The compiled sizes: X(steps, stride, tiles): products per row of taps, stride along a row, and
// tiles of output along a row of a unit.
#define DWSWAP_TOEPLITZ_SIZES(X) \
  X(1, 1, 1)                     \
  X(1, 1, 2) X(1, 1, 4) X(1, 1, 7) X(2, 1, 4) X(3, 1, 4) X(2, 2, 1) X(2, 2, 2) X(2, 2, 4) X(3, 2, 4)

// Columns of input that the tiles of a unit see.
constexpr int input_columns(int steps, int stride, int tiles) {
  return (stride * (tiles - 1) + 2 * steps) * kTile;
}

// Elements from one row of a group in shared memory to the next: rows begin in different banks.
constexpr int row_elements(int columns) { return kGroup * columns + kTile; }

// Words of one row of taps, spread out as the band of a Toeplitz matrix: two copies where a lane
// may begin at an odd element.
constexpr int band_words(int steps, int stride) {
  const int words = (kStep * steps + (kTile - 1) * stride + 1) / 2;
  return stride == 1 ? 2 * words : words;
}

struct Cut {
  int steps, tiles;            // of DWSWAP_TOEPLITZ_SIZES
  int channels, images, rows;  // of a unit; rows of output
  int in_rows;                 // of a unit and image
  int threads;

  // Elements from one group of channels to the next, so that those of neighbouring groups lie in
  // different banks.
  int group_elements(int stride) const;
  int64_t shared_bytes(int stride, int64_t kernel_h) const;
};

// Columns of input in front of the first output's: the padding rounded up, so that pieces of 4
// elements stay aligned.
constexpr int64_t lead_of(int64_t padding_w) { return ceil_div(padding_w, 4) * 4; }

// Where the columns of a unit lie in shared memory.
struct Columns {
  int lead;          // column of the first output
  int first, count;  // that inputs are copied to
  int shift;         // column that outputs begin at
  bool whole;        // one unit sees whole rows; zeros beside them stay from unit to unit
};
Columns choose_columns(const DepthwiseConv2dParams& params, const Cut& cut);

// The products that a row of taps takes; 0 where no compiled size has so many.
int choose_steps(const DepthwiseConv2dParams& params);

// The cut of a problem; the search for it is remembered. None fits: rows == 0.
Cut choose_cut(const DepthwiseConv2dParams& params, const Device& device);

// Compiled by a file per element type and stride.
template <typename T, int STRIDE>
cudaError_t launch_cut(const DepthwiseConv2dParams& params, const Cut& cut, const Device& device,
                       cudaStream_t stream);

}  // namespace toeplitz
}  // namespace dwswap
