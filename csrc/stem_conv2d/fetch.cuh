// Rows of input for the first layer of a network, from global to shared memory: channels_last
// there, whatever the layout of the image, with zeros for what is outside of it.
#pragma once

#include <type_traits>

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
// access.
constexpr int kFront = 16;
constexpr int kInputRows = 2 * kMostRows + 1;
// The last output's taps end with pixel 2 ox + 1: 2 x 16 x 8 pixels of 3 elements, 784 in all.
constexpr int kPitch = kFront + 2 * kTile * kMostTiles * kInputChannels;
static_assert(kFront >= 8 && kFront % 8 == 0 && kPitch % 8 == 0, "whole accesses of 16 bytes");
constexpr int kFirstElement = kFront - kInputChannels;  // that the first output sees

// An element in shared memory.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// How a thread reads the input: elements of pixels, or pixels of planes.
enum class Access { kVectors, kPairs, kElement, kPixels4, kPixel };

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  void* output;
  int height, width, out_h, out_w;
  int weight_plane, weight_row, weight_column;
  int channels;  // of the output
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
template <int BATCH, int STEP, int FIRST, typename B, typename Load, typename Store>
__device__ __forceinline__ void for_accesses(const Arguments& a, B* rows, Load&& load,
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
__device__ __forceinline__ void fetch_elements(const Arguments& a, const Unit& u, Bits<T>* rows) {
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
        [&](int, Bits<T>* target) {
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
        [&](int b, Bits<T>* target) { *target = static_cast<Bits<T>>(words[b].data[0]); });
  }
}

// Of an image in planes, N pixels at once; and one by one those in front of the first.
template <typename T, int N>
__device__ __forceinline__ void fetch_pixels(const Arguments& a, const Unit& u, Bits<T>* rows) {
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
  const auto store_pixel = [](Bits<T>* target, const auto& words) {
#pragma unroll
    for (int c = 0; c < kInputChannels; ++c) target[c] = static_cast<Bits<T>>(words[c].data[0]);
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
      [&](int b, Bits<T>* target) {
        const auto& [x, y, z] = words[b];  // the channels
        if constexpr (N == 1) {
          store_pixel(target, words[b]);
        } else if constexpr (sizeof(T) == 4) {
          static_assert(N == 4);
          auto* const vectors = reinterpret_cast<uint4*>(target);
          vectors[0] = {x.data[0], y.data[0], z.data[0], x.data[1]};
          vectors[1] = {y.data[1], z.data[1], x.data[2], y.data[2]};
          vectors[2] = {z.data[2], x.data[3], y.data[3], z.data[3]};
        } else {
          static_assert(N == 4);
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
__device__ __forceinline__ void fetch(const Arguments& a, const Unit& u, Bits<T>* rows) {
  switch (a.access) {
    case Access::kVectors:
      return fetch_elements<T, kVectorBytes / sizeof(T)>(a, u, rows);
    case Access::kPairs:
      return fetch_elements<T, 2>(a, u, rows);
    case Access::kElement:
      return fetch_elements<T, 1>(a, u, rows);
    case Access::kPixels4:
      return fetch_pixels<T, 4>(a, u, rows);
    case Access::kPixel:
      return fetch_pixels<T, 1>(a, u, rows);
  }
}

template <typename T>
Access access_of(const StemConv2dParams& p) {
  constexpr int kSize = sizeof(T), kVector = kVectorBytes / kSize;
  const auto place = reinterpret_cast<uintptr_t>(p.input);
  if (p.layout == Layout::kChannelsLast) {
    if (place % kVectorBytes == 0 && p.width % kVector == 0) return Access::kVectors;
    return place % (2 * kSize) == 0 && p.width % 2 == 0 ? Access::kPairs : Access::kElement;
  }
  return place % (4 * kSize) == 0 && p.width % 4 == 0 ? Access::kPixels4 : Access::kPixel;
}

// Those of a row: of the pixels that a unit's outputs see, and of elements those in front of them.
template <typename T>
int accesses_of_row(Access access, int tiles) {
  const int pixels = 2 * kTile * tiles, elements = kInputChannels * pixels;
  switch (access) {
    case Access::kVectors:
      return 1 + elements / (kVectorBytes / static_cast<int>(sizeof(T)));
    case Access::kPairs:
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

template <typename T>
Arguments arguments_of(const StemConv2dParams& p, const Cut& cut) {
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.output = p.output;
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.channels = static_cast<int>(p.channels);
  a.out_h = static_cast<int>(p.out_h()), a.out_w = static_cast<int>(p.out_w());
  a.weight_plane = static_cast<int>(p.weight_plane);
  a.weight_row = static_cast<int>(p.weight_row);
  a.weight_column = static_cast<int>(p.weight_column);
  a.rows = cut.rows, a.tiles = cut.tiles;
  a.access = access_of<T>(p);
  a.accesses = accesses_of_row<T>(a.access, cut.tiles);
  a.by_groups = Divisor(static_cast<uint32_t>(cut.groups));
  a.by_pieces = Divisor(static_cast<uint32_t>(cut.pieces));
  a.by_accesses = Divisor(static_cast<uint32_t>(a.accesses));
  a.activation = p.activation;
  return a;
}

}  // namespace stem
}  // namespace dwswap
