// How channel_tiles cuts a problem into blocks.
#pragma once

#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace channel_tiles {

constexpr int kMaxThreads = 128;
constexpr int kColumns = 7;     // of a thread
constexpr int kMostGroups = 8;  // along an axis
constexpr int kMostKernel = 7;

// Rows of outputs of a thread: many save loads; one makes enough threads of a small problem.
enum class Depth { kDeep, kFlat };

// How a problem is cut into blocks.
struct Tile {
  int pairs;               // of channels per block
  int groups_w, groups_h;  // threads of a pair along columns and rows

  int threads() const { return pairs * groups_w * groups_h; }
};

// How a tile is read: by the copy engine, or by asynchronous copies of so many bytes.
struct Reader {
  bool bulk;
  int vector_bytes;  // 16, 8 or 4
};

// The outputs that are `dilation` apart, and the inputs that these see, are a problem without a
// dilation: all such problems, as a batch of the largest.
DepthwiseConv2dParams lattice_of(const DepthwiseConv2dParams& params);

Depth choose_depth(const DepthwiseConv2dParams& params, int multiprocessors);
Tile choose_tile(const DepthwiseConv2dParams& params, const Reader& reader, int columns, int rows,
                 int element_bytes, int multiprocessors);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, const Reader& reader,
                         int multiprocessors, cudaStream_t stream);

}  // namespace channel_tiles
}  // namespace dwswap
