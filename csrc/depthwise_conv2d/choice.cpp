// The launch choice: from a problem to the family of kernels that runs it. The sizes were measured
// on an H200 and scale with the multiprocessors.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "common/check.h"
#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/plane_bands_cut.h"
#include "depthwise_conv2d/plane_strips_cut.h"

namespace dwswap {
namespace {

struct Family {
  const char* name;
  bool (*covers)(const DepthwiseConv2dParams&);
  bool (*suits)(const DepthwiseConv2dParams&);
  cudaError_t (*launch)(const DepthwiseConv2dParams&, cudaStream_t);
  bool reverses_taps;

  Choice choice() const { return {name, launch, reverses_taps}; }
};

int64_t outputs_per_multiprocessor(const DepthwiseConv2dParams& p) {
  return p.outputs() / current_device().multiprocessors;
}

// Such a limit: `one` for one image, and nearer to `many` the more images there are, as planes are
// smaller then.
int64_t limit_by_images(const DepthwiseConv2dParams& p, int64_t one, int64_t many) {
  return many + (one - many) / std::max<int64_t>(p.batch, 1);
}

bool always(const DepthwiseConv2dParams&) { return true; }

// A stream down the image pays where there is much to stream; small problems want many threads.
bool is_stream(const DepthwiseConv2dParams& p) {
  constexpr int64_t kEnough = 14000;
  return outputs_per_multiprocessor(p) >= kEnough;
}

// float32 with stride 2 has so few instructions per byte that plain loads keep up with a copy; the
// copy engine cannot read pixels that do not begin at 16 bytes, and has more to set up than a small
// problem has to compute, or one with stride 2, of which the tile has more input than work.
bool suits_channel_direct(const DepthwiseConv2dParams& p) {
  if (!uses_bulk_copies(current_device())) return true;
  constexpr int64_t kTinyImage = 3 * 3;
  constexpr int64_t kCopyEngineBytes = 16;
  const bool is_float = p.dtype == DataType::kFloat32;
  if (p.stride_h == 2 && (is_float || !is_stream(p))) return true;
  if (p.channels * bytes_of(p.dtype) % kCopyEngineBytes != 0) return true;
  return p.out_h * p.out_w <= kTinyImage && !is_stream(p);
}

// Few outputs, so that all are under way at once. In NCHW rolling_rows loads all its inputs at
// once as well; in channels_last this keeps up with all others for long, longest in float32 with
// stride 2, of rows whose neighbours are still in the caches. Every thread transforms its window
// anew, which costs little where that is a clamp; with a dilation it has one pixel, as a rule.
bool suits_points(const DepthwiseConv2dParams& p) {
  constexpr int64_t kWideRow = 28;
  const bool is_float = p.dtype == DataType::kFloat32, strided = p.stride_h > 1;
  const bool last = p.in_layout == Layout::kChannelsLast;
  const int64_t outputs = outputs_per_multiprocessor(p);
  const bool gates =
      p.transforms_input() && std::max(p.input_activation, p.activation) > Activation::kRelu6;
  if (gates || p.is_dilated()) {
    if (!last) return outputs <= 1000;
    return outputs <= (strided ? (is_float ? 1700 : 3000) : (is_float ? 600 : 1000));
  }
  if (!last) return outputs <= (strided ? 500 : 1700);
  if (is_float && strided)
    return outputs <= (p.out_w < kWideRow ? 100000 : limit_by_images(p, 30000, 15000));
  return outputs <= (is_float ? 5000 : 7000);
}

// A large float32 image has few instructions per byte, and tiles keep more bytes in flight.
bool suits_channel_columns(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLargeImage = 28 * 28;
  const bool large = p.stride_h == 1 && p.out_h * p.out_w > kLargeImage;
  return is_stream(p) && !(p.dtype == DataType::kFloat32 && large);
}

// Copies into and out of shared memory take longer than the work of a small problem. The more taps,
// the more a thread of rolling_rows has to load before it begins; half precision, which it loads
// element by element, most of all. Small planes leave more of its threads idle.
bool suits_plane_strips(const DepthwiseConv2dParams& p) {
  const bool is_float = p.dtype == DataType::kFloat32, strided = p.stride_h > 1;
  const int64_t taps = p.kernel_h * p.kernel_w, outputs = outputs_per_multiprocessor(p);
  const auto from = [&](int64_t one_image, int64_t many) {
    return outputs >= limit_by_images(p, one_image, many);
  };
  if (taps <= 9 && is_float) return strided ? from(45000, 27000) : from(45000, 9500);
  if (taps <= 9) return from(15000, 7000);
  if (taps <= 25 && strided) return is_float ? from(12000, 4500) : outputs >= 3500;
  if (taps <= 25) return is_float ? from(20000, 5000) : from(13000, 3200);
  return outputs >= (is_float ? 2000 : 1000);
}

// Of a lattice with fewer columns than this most of channel_tiles' 7 are in vain: toeplitz is
// faster, and general is with one less.
constexpr int64_t kFewColumns = 4;

int64_t lattice_columns(const DepthwiseConv2dParams& p) { return ceil_div(p.out_w, p.dilation_w); }

// The families of few taps are bound by memory; none of them is compiled for a large kernel, or for
// a dilation but rolling_rows, which is slower, and channel_tiles.
bool suits_toeplitz(const DepthwiseConv2dParams& p) {
  constexpr int64_t kManyTaps = 49;
  if (p.kernel_h * p.kernel_w > kManyTaps) return true;
  return p.is_dilated() && (!covers_channel_tiles(p) || lattice_columns(p) < kFewColumns);
}

bool suits_channel_tiles(const DepthwiseConv2dParams& p) {
  return !p.is_dilated() || lattice_columns(p) >= kFewColumns - 1;
}

// A small problem is over before the pipeline of stages is full. Of long rows channel_tiles is at
// 71 to 94 % of a copy, and this at 45 to 48 %.
bool suits_diagonal(const DepthwiseConv2dParams& p) {
  constexpr int64_t kEnough = 10000;
  return outputs_per_multiprocessor(p) >= kEnough && p.in_w <= (p.stride_w == 1 ? 72 : 100);
}

// It computes whole tiles of columns, and a small problem is over before the bands are loaded; that
// of few images all the more, as the walks of a product are short pieces of them. Long rows with
// stride 2 were faster in plane_strips, 9 columns, of which the second tile has one, and planes
// that its threads hold.
bool suits_plane_bands(const DepthwiseConv2dParams& p) {
  constexpr int64_t kTile = plane_bands::kTile, kLongRow = 64;
  const bool few_taps = p.kernel_w == 5 && p.stride_w == 1;
  const int64_t enough =
      few_taps ? limit_by_images(p, 15000, 3000) : limit_by_images(p, 10000, 2500);
  if (outputs_per_multiprocessor(p) < enough) return false;
  if (p.stride_w == 2 && p.out_w > kLongRow) return false;
  if (plane_strips::may_hold_planes(p)) return false;
  const int64_t least = p.kernel_w == 7 ? kTile - 1 : kTile;
  return std::min(p.out_h, p.out_w) >= least && p.out_w != kTile + 1;
}

// In order of preference. The second lines of channel_direct, plane_strips and points are for what
// no other fast family covers.
constexpr Family kFamilies[] = {
    {"toeplitz", covers_toeplitz, suits_toeplitz, launch_toeplitz, false},
    {"diagonal", covers_diagonal, suits_diagonal, launch_diagonal, false},
    {"points", covers_points, suits_points, launch_points, true},
    {"channel_direct", covers_channel_direct, suits_channel_direct, launch_channel_direct, true},
    {"channel_columns", covers_channel_columns, suits_channel_columns, launch_channel_columns,
     true},
    {"channel_tiles", covers_channel_tiles, suits_channel_tiles, launch_channel_tiles, true},
    {"channel_direct", covers_channel_direct, always, launch_channel_direct, true},
    {"plane_bands", covers_plane_bands, suits_plane_bands, launch_plane_bands, true},
    {"plane_strips", covers_plane_strips, suits_plane_strips, launch_plane_strips, true},
    {"rolling_rows", covers_rolling_rows, always, launch_rolling_rows, true},
    {"plane_strips", covers_plane_strips, always, launch_plane_strips, true},
    {"points", covers_points, always, launch_points, true},
    {"general", always, always, launch_general, false},
};

}  // namespace

Choice choose_forward(const DepthwiseConv2dParams& params) {
  // For tests and measurements: the family that this names, where it covers the problem.
  const char* wanted = std::getenv("DWSWAP_FAMILY");
  if (wanted != nullptr && *wanted != '\0') {
    bool known = false;
    for (const Family& family : kFamilies) {
      if (std::string_view(family.name) != wanted) continue;
      if (family.covers(params)) return family.choice();
      known = true;
    }
    DWSWAP_CHECK(known, "DWSWAP_FAMILY must name a family of kernels, got '", wanted, "'");
  }
  const Family* family = kFamilies;
  // What suits is soon said; what is covered may take a search for a cut.
  while (!family->suits(params) || !family->covers(params)) ++family;
  return family->choice();
}

}  // namespace dwswap
