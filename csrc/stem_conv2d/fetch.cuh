// Rows of input for the first layer of a network, from global to shared memory: channels_last
// there, whatever the layout of the image, with zeros for what is outside of it.
#pragma once

#include "common/async_copy.cuh"
#include "common/numeric.cuh"
#include "stem_conv2d/cut.h"
#include "stem_conv2d/params.h"

namespace dwswap {
namespace stem {

constexpr int kWarp = 32;
constexpr int kThreads = kWarp * kWarps;
constexpr int kInputChannels = 3;
constexpr int kTaps = 27;

// Rows of input in shared memory: element kFront is channel 0 of the pixel 2 ox of the first
// output. In front of it is what the first output's left taps see, and what comes with it in one
// access of 8 elements.
constexpr int kFront = 16;
constexpr int kInputRows = 2 * kMostRows + 1;
// The last output's taps end with pixel 2 ox + 1: 2 x 16 x 8 pixels of 3 elements, 784 in all.
constexpr int kPitch = kFront + 2 * kTile * kMostTiles * kInputChannels;
static_assert(kFront >= 8 && kFront % 8 == 0 && kPitch % 8 == 0, "whole accesses of 16 bytes");
constexpr int kPitchWords = kPitch / 2;
// Of the first output: element 0 is at an odd place, the pairs behind it are words.
constexpr int kFirstElement = kFront - kInputChannels;
static_assert(kFirstElement % 2 == 1);

// How a thread reads the input: elements of pixels, or pixels of planes.
enum class Access { kElements8, kElements2, kElement, kPixels4, kPixel };

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  void* output;
  int height, width, out_h, out_w;
  int weight_plane, weight_row, weight_column;
  int rows, tiles;
  int accesses;  // of a row of input in shared memory
  Divisor by_groups, by_pieces, by_accesses;
  Activation activation;
  Access access;
};

struct Unit {
  int64_t image;
  int row, column;  // of output, the first ones
};

__device__ __forceinline__ Unit unit_at(const Arguments& a, uint32_t index) {
  uint32_t piece, group;
  const uint32_t image = a.by_groups.divide(a.by_pieces.divide(index, &piece), &group);
  return {image, static_cast<int>(group) * a.rows, static_cast<int>(piece) * a.tiles * kTile};
}

// All accesses of the unit's input by all threads, STEP elements of shared memory each, BATCH at
// once for a thread: load(b, exists, row, element) for each of them, then store(b, target).
// Elements count from the pixel 2 ox of the first output; FIRST is that of the first access of a
// row.
template <int BATCH, int STEP, int FIRST, typename Load, typename Store>
__device__ __forceinline__ void for_accesses(const Arguments& a, uint16_t* rows, Load&& load,
                                             Store&& store) {
  const int total = (2 * a.rows + 1) * a.accesses;
  for (int begin = threadIdx.x; begin < total; begin += BATCH * kThreads) {
    int targets[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int index = begin + b * kThreads;
      uint32_t access;
      const auto row = static_cast<int>(a.by_accesses.divide(index, &access));
      const int element = static_cast<int>(access) * STEP + FIRST;
      targets[b] = row * kPitch + kFront + element;
      load(b, index < total, row, element);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      if (begin + b * kThreads < total) store(b, rows + targets[b]);
    }
  }
}

__device__ __forceinline__ bool is_below(int x, int limit) {  // and not below zero
  return static_cast<unsigned>(x) < static_cast<unsigned>(limit);
}

// Of an image in channels_last, N elements at once; outside of it are zeros.
template <typename T, int N>
__device__ __forceinline__ void fetch_elements(const Arguments& a, const Unit& u, uint16_t* rows) {
  constexpr int kBefore = (kInputChannels + N - 1) / N * N;
  const int row_elements = kInputChannels * a.width;
  const int top = 2 * u.row - 1, left = 2 * kInputChannels * u.column;
  const T* const image =
      static_cast<const T*>(a.input) + u.image * a.height * static_cast<int64_t>(row_elements);
  const auto is_inside = [&](int row, int element) {
    return is_below(top + row, a.height) && is_below(left + element, row_elements);
  };
  const auto source = [&](int row, int element) {
    return image + ((top + row) * row_elements + left + element);
  };
  if constexpr (N > 1) {
    const T* from = nullptr;
    bool wanted = false;
    for_accesses<1, N, -kBefore>(
        a, rows,
        [&](int, bool, int row, int element) {
          wanted = is_inside(row, element);
          from = wanted ? source(row, element) : image;
        },
        [&](int, uint16_t* target) {
          constexpr int kBytes = N * sizeof(T);
          copy_async<kBytes>(target, from, wanted ? kBytes : 0);
        });
    wait_for_copies();
  } else {
    constexpr int kBatch = 8;
    Words<T, 1> words[kBatch];
    for_accesses<kBatch, N, -kBefore>(
        a, rows,
        [&](int b, bool exists, int row, int element) {
          words[b] = {};
          load_where<1>(exists && is_inside(row, element), source(row, element), words[b]);
        },
        [&](int b, uint16_t* target) { *target = static_cast<uint16_t>(words[b].data[0]); });
  }
}

// Of an image in planes, N pixels at once; and one by one those in front of the first.
template <typename T, int N>
__device__ __forceinline__ void fetch_pixels(const Arguments& a, const Unit& u, uint16_t* rows) {
  constexpr int kBatch = 4, kStep = N * kInputChannels;
  const int plane = a.height * a.width;
  const int top = 2 * u.row - 1, left = 2 * u.column;
  const T* const image =
      static_cast<const T*>(a.input) + u.image * kInputChannels * static_cast<int64_t>(plane);
  const auto load_pixels = [&](bool wanted, int y, int x, auto& words) {
    const T* const source = image + (y * a.width + x);
    const bool is_inside = wanted && is_below(y, a.height) && is_below(x, a.width);
#pragma unroll
    for (int c = 0; c < kInputChannels; ++c) {
      words[c] = {};
      load_where(is_inside, source + c * plane, words[c]);
    }
  };
  const auto store_pixel = [](uint16_t* target, const auto& words) {
#pragma unroll
    for (int c = 0; c < kInputChannels; ++c) target[c] = static_cast<uint16_t>(words[c].data[0]);
  };

  const auto thread = static_cast<int>(threadIdx.x);
  const bool has_first = thread < 2 * a.rows + 1;
  Words<T, 1> first[kInputChannels];
  load_pixels(has_first, top + thread, left - 1, first);
  Words<T, N> words[kBatch][kInputChannels];
  for_accesses<kBatch, kStep, 0>(
      a, rows,
      [&](int b, bool exists, int row, int element) {
        load_pixels(exists, top + row, left + element / kInputChannels, words[b]);
      },
      [&](int b, uint16_t* target) {
        if constexpr (N == 1) {
          store_pixel(target, words[b]);
        } else {
          static_assert(N == 4);
          const auto& [x, y, z] = words[b];  // the channels
          uint32_t mixed[6];
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            mixed[3 * w] = __byte_perm(x.data[w], y.data[w], 0x5410);      // x0 y0
            mixed[3 * w + 1] = __byte_perm(z.data[w], x.data[w], 0x7610);  // z0 x1
            mixed[3 * w + 2] = __byte_perm(y.data[w], z.data[w], 0x7632);  // y1 z1
          }
#pragma unroll
          for (int w = 0; w < 3; ++w)
            reinterpret_cast<uint2*>(target)[w] = {mixed[2 * w], mixed[2 * w + 1]};
        }
      });
  if (has_first) store_pixel(rows + thread * kPitch + kFirstElement, first);
}

template <typename T>
__device__ __forceinline__ void fetch(const Arguments& a, const Unit& u, uint16_t* rows) {
  switch (a.access) {
    case Access::kElements8:
      return fetch_elements<T, 8>(a, u, rows);
    case Access::kElements2:
      return fetch_elements<T, 2>(a, u, rows);
    case Access::kElement:
      return fetch_elements<T, 1>(a, u, rows);
    case Access::kPixels4:
      return fetch_pixels<T, 4>(a, u, rows);
    case Access::kPixel:
      return fetch_pixels<T, 1>(a, u, rows);
  }
}

inline Access access_of(const StemConv2dParams& p) {
  const auto place = reinterpret_cast<uintptr_t>(p.input);
  if (p.layout == Layout::kChannelsLast) {
    if (place % 16 == 0 && p.width % 8 == 0) return Access::kElements8;
    return place % 4 == 0 && p.width % 2 == 0 ? Access::kElements2 : Access::kElement;
  }
  return place % 8 == 0 && p.width % 4 == 0 ? Access::kPixels4 : Access::kPixel;
}

// Those of a row: of the pixels that a unit's outputs see, and of elements those in front of them.
inline int accesses_of_row(Access access, int tiles) {
  const int pixels = 2 * kTile * tiles, elements = kInputChannels * pixels;
  switch (access) {
    case Access::kElements8:
      return 1 + elements / 8;
    case Access::kElements2:
      return 2 + elements / 2;
    case Access::kElement:
      return 3 + elements;
    case Access::kPixels4:
      return pixels / 4;
    case Access::kPixel:
      break;
  }
  return pixels;
}

}  // namespace stem
}  // namespace dwswap
