// How gram_sums cuts a problem into stages and blocks, and how rows lie in shared memory.
#pragma once

#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace gram_sums {

constexpr int kChannels = 8;  // of a block: one of a warp
constexpr int kThreads = 32 * kChannels;
constexpr int kTile = 8;  // rows and columns of a matrix of 16-bit elements
constexpr int kTileBytes = 2 * kTile;
constexpr int kStepRows = 2 * kTile;  // of a product
constexpr int kMostImages = 16;       // of a stage: its copies are those of a warp's lanes
constexpr int kCopyBytes = 16;        // bulk copies begin and end at multiples of these

// Blocks of a multiprocessor whose registers there are.
constexpr int most_blocks(int kernel, int stride, bool bias) {
  if (kernel == 3) return stride == 1 ? 4 : 3;
  if (kernel == 5) return stride == 1 || !bias ? 3 : 2;
  return stride == 1 && !bias ? 3 : 2;
}

// Where the rows of an image lie for the products, with zeros around them.
struct Rows {
  int count;        // that products read: with padding, and up to a multiple of theirs
  int piece;        // bytes that a lane moves at once: 8 or 4
  bool is_aligned;  // rows begin at multiples of pieces; else anywhere, between words too
  int lead;         // bytes before the first column
  int pitch;        // from row to row; an odd multiple of 16: no two of 8 rows share a bank
  int odd_rows;     // bytes to the odd rows, where a product has every second one
  int image_bytes;  // from image to image
};

// Of a row; the lanes of a warp move as many at once.
inline int pieces_of(int64_t width, const Rows& rows) {
  return static_cast<int>(ceil_div(2 * width, rows.piece));
}

// A stage: the planes of 8 channels of some images as they are in memory, or strips of the planes
// of one image.
struct Cut {
  int images, strips;
  int rows;      // of grad_output, of a strip
  int together;  // images of a product: 2 where planes are low
  // Bytes from image to image, or from plane to plane where there are strips.
  int64_t input_bytes, grad_bytes;
  Rows input, grad;
  int slots;  // stages in shared memory
  int shares;

  bool has_whole_planes() const { return strips == 1; }
  int copies() const { return has_whole_planes() ? images : kChannels; }  // of a side
  int64_t grad_begin() const { return copies() * input_bytes; }
  int64_t stage_bytes() const { return grad_begin() + copies() * grad_bytes + kCopyBytes; }
  // Of a warp.
  int64_t spread_bytes() const {
    return int64_t{together} * (input.image_bytes + grad.image_bytes);
  }
  int64_t shared_bytes() const {
    return slots * (stage_bytes() + static_cast<int64_t>(sizeof(uint64_t))) +
           kChannels * spread_bytes();
  }
};

// No slots: the stages do not fit.
Cut choose_cut(const GradientParams& params, const Device& device);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const GradientParams& params, const Device& device, cudaStream_t stream);

}  // namespace gram_sums
}  // namespace dwswap
