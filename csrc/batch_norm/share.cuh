// Which values of a batch a thread has.
#pragma once

#include "batch_norm/cut.h"
#include "batch_norm/params.h"
#include "common/numeric.cuh"

namespace dwswap {
namespace batch_norm {

// A Cut as kernels take it.
struct Places {
  Divisor by_plane;    // vectors of a plane
  Divisor by_columns;  // columns of a channel
  Divisor by_pixels;   // pixels of an image
  uint32_t values;     // of a channel
  uint32_t positions, columns;
  int32_t lanes, rows, splits;
  int32_t channel_step, pixel_step;  // elements from one channel, or pixel, to the next

  __device__ __forceinline__ int channel_of(int column) const {
    uint32_t rest;
    return static_cast<int>(by_columns.divide(column, &rest));
  }
};

// The vectors of V elements that one thread has: V columns of some rows of a matrix, otherwise some
// vectors of the planes of one channel.
template <typename T, int V, bool MATRIX>
struct Share {
  static constexpr int kColumns = MATRIX ? V : 1;
  int row, column;  // of the block, of all
  bool active;
  uint32_t first, step;

  __device__ __forceinline__ explicit Share(const Places& places) {
    const auto thread = static_cast<int>(threadIdx.x);
    const int lane = MATRIX ? thread % places.lanes : 0;
    row = MATRIX ? thread / places.lanes : thread;
    const uint32_t from = (blockIdx.x * places.lanes + lane) * kColumns;
    active = row < places.rows && from < places.columns;
    column = active ? static_cast<int>(from) : 0;
    first = blockIdx.y * places.rows + row;
    step = gridDim.y * places.rows;
  }

  __device__ __forceinline__ int64_t place(const BatchNormParams& p, const Places& places,
                                           uint32_t position) const {
    if constexpr (MATRIX) {
      return static_cast<int64_t>(position) * places.columns + column;
    } else {
      uint32_t vector;
      const uint32_t image = places.by_plane.divide(position, &vector);
      return (static_cast<int64_t>(image) * p.channels + column) * p.pixels + vector * V;
    }
  }

  // The values that a row of statistics has for the thread's columns.
  __device__ __forceinline__ void load_row(const Places& places, const float* source,
                                           float (&target)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) target[i] = __ldg(source + places.channel_of(column + i));
  }

  // visit(place, loaded) for all vectors, the loads of kUnroll of them side by side; from the last
  // position on where REVERSED.
  template <bool REVERSED, typename Load, typename Visit>
  __device__ __forceinline__ void for_each(const BatchNormParams& p, const Places& places,
                                           Load&& load, Visit&& visit) const {
    if (!active) return;
#pragma unroll 1
    for (uint32_t at = first; at < places.positions; at += kUnroll * step) {
      decltype(load(int64_t{})) loaded[kUnroll];
      int64_t where[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const uint32_t position = at + i * step;
        if (position >= places.positions) continue;
        where[i] = place(p, places, REVERSED ? places.positions - 1 - position : position);
        loaded[i] = load(where[i]);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (at + i * step < places.positions) visit(where[i], loaded[i]);
      }
    }
  }
};

template <typename T, int V>
struct Pair {
  Words<T, V> x, gradient;
};

}  // namespace batch_norm
}  // namespace dwswap
