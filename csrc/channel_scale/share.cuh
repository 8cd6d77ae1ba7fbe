// Which values of the images a thread has.
#pragma once

#include "channel_scale/cut.h"
#include "channel_scale/params.h"
#include "common/numeric.cuh"

namespace dwswap {
namespace channel_scale {

// A Cut as kernels take it.
struct Places {
  Divisor by_group, by_lanes;    // threads of a group
  Divisor by_chunks, by_splits;  // of an image, or a plane
  uint32_t units;
  int32_t lanes, rows, groups, chunks, splits;
  int32_t positions, span;

  Places() = default;
  explicit Places(const Cut& cut)
      : by_group(static_cast<uint32_t>(cut.lanes * cut.rows)),
        by_lanes(static_cast<uint32_t>(cut.lanes)),
        by_chunks(static_cast<uint32_t>(cut.chunks)),
        by_splits(static_cast<uint32_t>(cut.splits)),
        units(static_cast<uint32_t>(cut.units)),
        lanes(cut.lanes),
        rows(cut.rows),
        groups(cut.groups),
        chunks(cut.chunks),
        splits(cut.splits),
        positions(cut.positions),
        span(cut.span) {}
};

// The vectors of V elements that one thread has: in channels_last (LAST) V channels of some pixels
// of an image, otherwise some vectors of a plane.
template <int V, bool LAST>
struct Share {
  static constexpr int kColumns = LAST ? V : 1;
  int row;
  bool active;
  int64_t plane;  // the first in (batch, channels)
  uint32_t split;
  int64_t base;     // the element at the first position of the image, or plane
  int first, last;  // positions

  // Unit `block` * groups and those after it are the block's.
  __device__ __forceinline__ Share(const ChannelScaleParams& p, const Places& places,
                                   uint32_t block) {
    uint32_t rest, lane, chunk;
    const uint32_t group = places.by_group.divide(threadIdx.x, &rest);
    row = static_cast<int>(places.by_lanes.divide(rest, &lane));
    const uint32_t unit = block * places.groups + group;
    active = group < static_cast<uint32_t>(places.groups) && unit < places.units;
    const uint32_t part = places.by_chunks.divide(active ? unit : 0, &chunk);
    const int64_t outer = places.by_splits.divide(part, &split);
    if constexpr (LAST) {
      const int channel = static_cast<int>(chunk * places.lanes + lane) * V;
      active = active && channel < p.channels;
      plane = outer * p.channels + channel;
      base = outer * p.pixels * p.channels + channel;
    } else {
      plane = outer;
      base = outer * p.pixels;
    }
    const int begin = static_cast<int>(split) * places.span;
    first = begin + row;
    last = min(begin + places.span, places.positions);
  }

  // visit(place, loaded) for all vectors, the loads of kUnroll of them side by side.
  template <typename Load, typename Visit>
  __device__ __forceinline__ void for_each(const ChannelScaleParams& p, const Places& places,
                                           Load&& load, Visit&& visit) const {
    if (!active) return;
    constexpr int kSteps = kUnroll<V>;
    const auto place = [&](int position) {
      return base + static_cast<int64_t>(position) * (LAST ? p.channels : V);
    };
#pragma unroll 1
    for (int at = first; at < last; at += kSteps * places.rows) {
      decltype(load(int64_t{})) loaded[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int position = at + i * places.rows;
        if (position < last) loaded[i] = load(place(position));
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int position = at + i * places.rows;
        if (position < last) visit(place(position), loaded[i]);
      }
    }
  }
};

}  // namespace channel_scale
}  // namespace dwswap
