// How plane_bands cuts a problem into units, blocks and warps.
#pragma once

#include <algorithm>

#include "common/data_type.h"
#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace plane_bands {

constexpr int kTile = 8;    // columns of output of one product
constexpr int kWalks = 16;  // rows of the other matrix: walks down the columns of a tile
constexpr int kMaxWarps = 8;
constexpr int kMinBlocks = 2;  // of kMaxWarps, whose registers a multiprocessor has
constexpr int kStages = 2;     // of input in shared memory
constexpr int kBuffers = 2;    // of output
// In front of and behind the stages, for what a lane reads beside its rows: no more than a window.
constexpr int kMargin = 64;
constexpr int kStaticBytes = 64;  // of shared memory: the barriers

// Rows of output that a walk adds up at once.
constexpr int ring_rows(int kernel, int stride) { return (kernel - 1) / stride + 1; }

// Parts of 8 columns of the window that a tile sees, if it begins at an even element.
constexpr int window_parts(int stride) { return stride == 1 ? 2 : 3; }
static_assert(7 * 1 + 7 + 1 <= 8 * window_parts(1) && 7 * 2 + 5 + 1 <= 8 * window_parts(2));

// The compiled sizes: X(kernel, stride). 7 x 7 with stride 2, which no network has, would not fit
// the registers.
#define DWSWAP_PLANE_BANDS_SIZES(X) X(5, 1) X(5, 2) X(7, 1)

inline bool is_compiled(const DepthwiseConv2dParams& p) {
#define DWSWAP_CASE(K, S) \
  if (p.kernel_h == K && p.stride_h == S) return true;
  DWSWAP_PLANE_BANDS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return false;
}

// A unit: whole planes of neighbouring channels, or a strip of rows of one channel, of some images.
// Its walks are segments of the rows of its images.
struct Cut {
  int images, segments;     // images * segments == kWalks
  int planes, rows;         // rows of output, of a plane
  int segment_rows;         // of output
  int warps;                // of a block
  int in_pitch, out_pitch;  // bytes from image to image of a stage and of a buffer

  int shared_bytes() const {
    return 2 * kMargin + images * (kStages * in_pitch + kBuffers * out_pitch);
  }
};

// Rows of input that a unit copies, of a plane.
inline int64_t unit_in_rows(const DepthwiseConv2dParams& p, int64_t rows) {
  return rows == p.out_h ? p.in_h : std::min((rows - 1) * p.stride_h + p.kernel_h, p.in_h);
}

// The cut of a problem; the search for it is remembered. None fits: rows == 0.
Cut choose_cut(const DepthwiseConv2dParams& params, const Device& device);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, const Device& device,
                         cudaStream_t stream);

}  // namespace plane_bands
}  // namespace dwswap
