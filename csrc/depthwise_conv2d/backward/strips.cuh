// Strips of columns of grad_output (channels_last), which a block walks down a stage at a time.
#pragma once

#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/backward/params.h"

namespace dwswap {

struct Strips {
  int in_h, out_h, padding_h;
  int rows, columns, images;  // of a strip: of grad_output, and how many images side by side
  int count;                  // of all images
  Divisor by_tiles, by_strips;

  Strips() = default;
  Strips(const GradientParams& p, int64_t rows_of_strip, int columns_of_strip, int images_of_strip)
      : in_h(static_cast<int>(p.in_h)),
        out_h(static_cast<int>(p.out_h)),
        padding_h(static_cast<int>(p.padding_h)),
        rows(static_cast<int>(rows_of_strip)),
        columns(columns_of_strip),
        images(images_of_strip) {
    const int64_t tiles = ceil_div(p.out_w, columns), strips = ceil_div(p.out_h, rows);
    count = static_cast<int>(tiles * strips * ceil_div(p.batch, images));
    by_tiles = Divisor(static_cast<uint32_t>(tiles));
    by_strips = Divisor(static_cast<uint32_t>(strips));
  }
};

struct Strip {
  int image, row, column;  // of grad_output, the first ones
  int rows, stages;
};

// Neighbours in a row first, then those below, then those of the next images. SEEN: rows of
// grad_output that a row of input is seen from.
template <int STRIDE, int SEEN>
__device__ __forceinline__ Strip strip_at(const Strips& all, int index, int stage_rows) {
  uint32_t tile, strip;
  const uint32_t image = all.by_strips.divide(all.by_tiles.divide(index, &tile), &strip);
  Strip s{};
  s.image = static_cast<int>(image) * all.images;
  s.row = static_cast<int>(strip) * all.rows;
  s.column = static_cast<int>(tile) * all.columns;
  s.rows = min(all.rows, all.out_h - s.row);
  // Rows behind those of the strip see its last rows of input, where there are any.
  const int input_rows = all.in_h - (s.row * STRIDE - all.padding_h);
  const int steps = min(s.rows + SEEN - 1, (input_rows + STRIDE - 1) / STRIDE);
  s.stages = (steps + stage_rows - 1) / stage_rows;
  return s;
}

}  // namespace dwswap
