// The first layer of a network on the tensor cores: 3 x 3 taps on 3 channels, stride 2, padding 1.
//
//   y[n, oy, ox, k] = activation(bias[k] + sum over r, s, c of
//                                x[n, c, 2 oy - 1 + r, 2 ox - 1 + s] w[k, c, r, s])
//
// A row r of the taps of an output is j = 3 s + c = 0, ..., 8: nine elements side by side in an
// image in channels_last, which is how rows lie in shared memory, whatever the layout of the image.
// 16 outputs of a row are the product of a 16 x 32 matrix, in two instructions, with one of 32 x 8
// for every 8 channels. In the order of the instruction's fragments, lane t of four has of it
//
//   k = 8 i + 2 t, + 1     of a:                       of b:
//   i = 0, 1, 2            row i, j = 2 t + 1, 2 t + 2  their taps
//   i = 3, t = 0, 1, 2     row t, j = 0; 0              its tap; 0
//   i = 3, t = 3           1; 0                         bias; 0
//
// so that a is pairs of elements at even places, 32 bits each, and what is no tap is 0 on both
// sides: an infinity or a NaN reaches the outputs whose taps see it, and no others. b stays in
// registers.
//
// It moves each byte of the output once, and those are most of it: 32 channels of a quarter of the
// pixels are 8 / 3 of the input. What a warp does for 16 outputs of 32 channels, 8 products and
// about 100 other instructions, may take 300 cycles next to the memory's time at 4.8 TB/s.
#pragma once

#include "common/async_copy.cuh"
#include "common/integer.h"
#include "common/matrix.cuh"
#include "common/numeric.cuh"
#include "stem_conv2d/cut.h"
#include "stem_conv2d/launch.h"
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
  int rows, tiles, turns;
  int accesses;  // of a row of input in shared memory
  int64_t units;
  Divisor by_groups, by_pieces, by_accesses;
  Activation activation;
  Access access;
};

// The tiles of 8 channels are taken by fours, then two, then one, so that a thread has 2, 4 or 8
// neighbouring channels of a pixel, and the four lanes of the pixel all of them: tile `tile` of
// TILES is in a chunk that begins with tile chunk_start, and has chunk_tiles.
constexpr int chunk_tiles(int tiles, int tile) {
  return tile < tiles / 4 * 4 ? 4 : tile % 4 < tiles % 4 / 2 * 2 ? 2 : 1;
}
constexpr int chunk_start(int tiles, int tile) {
  return tile / chunk_tiles(tiles, tile) * chunk_tiles(tiles, tile);
}
static_assert(chunk_tiles(7, 3) == 4 && chunk_tiles(7, 5) == 2 && chunk_tiles(7, 6) == 1);
static_assert(chunk_start(7, 3) == 0 && chunk_start(7, 5) == 4 && chunk_start(7, 6) == 6);
static_assert(chunk_tiles(5, 4) == 1 && chunk_start(5, 4) == 4 && chunk_tiles(1, 0) == 1);

template <typename T_, int CHANNELS_, bool CLAMPS_>
struct Traits {
  using T = T_;
  static constexpr bool kClamps = CLAMPS_;  // the activation is none, relu or relu6
  static constexpr int kChannels = CHANNELS_;
  static constexpr int kTiles = CHANNELS_ / 8;
  static_assert(CHANNELS_ % 8 == 0 && CHANNELS_ <= 64, "4 registers of taps for each tile");
  // Pixels of an odd number of 16 bytes: chunks would be written in halves of 32 bytes, so that
  // a warp's pixels, which follow each other, go by way of shared memory.
  static constexpr bool kStaged = kTiles % 2 == 1 && kTiles > 1;
  // Of a multiprocessor: 65536 / (6 x 128) = 80 registers for a thread, or 96, or 128. What loads
  // pixels of planes has 24 of them in flight, next to 4 for each tile.
  static constexpr int kBlocks = kTiles <= 4 ? kBlocksOfMultiprocessor : kTiles <= 6 ? 5 : 4;
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

// Fragments of b: lane 4 n + t has of column n, k = 8 i + 2 t and the next, as in the table above.
template <typename Traits>
__device__ __forceinline__ void load_taps(const Arguments& a, uint32_t (&taps)[Traits::kTiles][4]) {
  const int lane = threadIdx.x % kWarp, n = lane / 4, t = lane % 4;
  const auto* const weight = static_cast<const uint16_t*>(a.weight);
  const auto* const bias = static_cast<const uint16_t*>(a.bias);
  const auto tap = [&](int j) { return j / 3 * a.weight_column + j % 3 * a.weight_plane; };
  const int low = tap(2 * t + 1), high = tap(2 * t + 2);
#pragma unroll
  for (int j = 0; j < Traits::kTiles; ++j) {
    const int tiles = chunk_tiles(Traits::kTiles, j), start = chunk_start(Traits::kTiles, j);
    const int channel = 8 * start + n / 2 * 2 * tiles + 2 * (j - start) + n % 2;
    const uint16_t* const own = weight + channel * kTaps;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const uint16_t* const row = own + i * a.weight_row;
      taps[j][i] = __ldg(row + low) | static_cast<uint32_t>(__ldg(row + high)) << 16;
    }
    const uint16_t* const last = t < 3 ? own + t * a.weight_row : bias + channel;
    taps[j][3] = t < 3 || bias != nullptr ? __ldg(last) : 0;
  }
}

// The activation of N neighbouring channels, rounded.
template <typename Traits, int N>
__device__ __forceinline__ Words<typename Traits::T, N> finished(float (&sums)[N],
                                                                 Activation activation) {
  using T = typename Traits::T;
  if constexpr (!Traits::kClamps) {
    activate(sums, activation);
    return narrow_all<T>(sums);
  } else {
    // Of numbers that are in the range of both types, clamping and rounding change places.
    Words<T, N> words = narrow_all<T>(sums);
    const float lowest = activation == Activation::kNone ? -INFINITY : 0.0f;
    const float highest = activation == Activation::kRelu6 ? 6.0f : INFINITY;
    const uint32_t low = narrow_pair<T>(lowest, lowest), high = narrow_pair<T>(highest, highest);
#pragma unroll
    for (uint32_t& word : words.data) word = minimum_word<T>(maximum_word<T>(word, low), high);
    return words;
  }
}

// Channels from tile START on of the 16 outputs whose fragment of a is `pixels`. put(pixel,
// channel, words): pixel lane / 4, or that and 8.
template <typename Traits, int START = 0, typename Put>
__device__ __forceinline__ void multiply(const uint32_t (&pixels)[2][4],
                                         const uint32_t (&taps)[Traits::kTiles][4],
                                         Activation activation, Put&& put) {
  constexpr int kChunk = chunk_tiles(Traits::kTiles, START), N = 2 * kChunk;
  const int lane = threadIdx.x % kWarp;
  float upper[N], lower[N];
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t (&tap)[4] = taps[START + j];
      multiply_add<typename Traits::T>(sums, pixels[step], {tap[2 * step], tap[2 * step + 1]});
    }
    upper[2 * j] = sums[0], upper[2 * j + 1] = sums[1];
    lower[2 * j] = sums[2], lower[2 * j + 1] = sums[3];
  }
  const int channel = 8 * START + lane % 4 * N;
  put(lane / 4, channel, finished<Traits>(upper, activation));
  put(lane / 4 + 8, channel, finished<Traits>(lower, activation));
  if constexpr (START + kChunk < Traits::kTiles)
    multiply<Traits, START + kChunk>(pixels, taps, activation, put);
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocks)
    stem_conv2d_kernel(const __grid_constant__ Arguments a) {
  using T = typename Traits::T;
  constexpr int kChannels = Traits::kChannels;
  constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
  __shared__ __align__(kVectorBytes) uint16_t rows[kInputRows * kPitch];
  __shared__ __align__(kVectorBytes) T staged[Traits::kStaged ? kWarps * kTile * kChannels : 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane % 4;
  T* const stage = staged + (Traits::kStaged ? warp * kTile * kChannels : 0);
  const uint32_t one = narrow_pair<T>(1.0f, 0.0f);

  uint32_t taps[Traits::kTiles][4];
  load_taps<Traits>(a, taps);

  const int64_t first = int64_t{blockIdx.x} * a.turns;
  for (int turn = 0; turn < a.turns && first + turn < a.units; ++turn) {
    const Unit u = unit_at(a, static_cast<uint32_t>(first + turn));
    if (turn > 0) __syncthreads();  // until nobody reads the rows of the unit before
    fetch<T>(a, u, rows);
    __syncthreads();

    const int tiles = min(a.tiles, (a.out_w - u.column + kTile - 1) / kTile);
    const int height = min(a.rows, a.out_h - u.row);
    int row = 0, tile = warp;
    while (true) {
      while (tile >= tiles) tile -= tiles, ++row;
      if (row >= height) break;
      uint32_t pixels[2][4];
      const int output = tile * kTile + lane / 4;
      const uint16_t* const window =
          rows + 2 * row * kPitch + 2 * kInputChannels * output + kFirstElement;
      const auto* const pairs = reinterpret_cast<const uint32_t*>(window + 1) + t;
      const uint16_t* const alone = window + min(t, 2) * kPitch;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constexpr int kBetween = 2 * kInputChannels * (kTile / 2);  // elements
#pragma unroll
        for (int i = 0; i < 3; ++i)
          pixels[i / 2][i % 2 * 2 + half] = pairs[i * kPitchWords + half * (kBetween / 2)];
        const uint32_t element = alone[half * kBetween];
        pixels[1][2 + half] = t < 3 ? element : one;
      }

      const int column = u.column + tile * kTile;
      T* const target = static_cast<T*>(a.output) +
                        ((u.image * a.out_h + u.row + row) * a.out_w + column) * kChannels;
      const int outputs = min(kTile, a.out_w - column);
      if constexpr (Traits::kStaged) {
        multiply<Traits>(pixels, taps, a.activation, [&](int pixel, int channel, auto words) {
          store_words(stage + pixel * kChannels + channel, words);
        });
        __syncwarp();
        for (int i = lane; i < outputs * (kChannels / kVector); i += kWarp)
          store_words(target + i * kVector, load_words<kVector>(stage + i * kVector));
        __syncwarp();
      } else {
        multiply<Traits>(pixels, taps, a.activation, [&](int pixel, int channel, auto words) {
          if (pixel < outputs) store_words(target + pixel * kChannels + channel, words);
        });
      }
      tile += kWarps;
    }
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

template <typename Traits>
cudaError_t launch(const StemConv2dParams& p, const Device& device, cudaStream_t stream) {
  const Cut cut = choose_cut(p, device.multiprocessors);
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.output = p.output;
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_h = static_cast<int>(p.out_h()), a.out_w = static_cast<int>(p.out_w());
  a.weight_plane = static_cast<int>(p.weight_plane);
  a.weight_row = static_cast<int>(p.weight_row);
  a.weight_column = static_cast<int>(p.weight_column);
  a.rows = cut.rows, a.tiles = cut.tiles, a.turns = cut.turns, a.units = cut.units;
  a.access = access_of(p);
  a.accesses = accesses_of_row(a.access, cut.tiles);
  a.by_groups = Divisor(static_cast<uint32_t>(cut.groups));
  a.by_pieces = Divisor(static_cast<uint32_t>(cut.pieces));
  a.by_accesses = Divisor(static_cast<uint32_t>(a.accesses));
  a.activation = p.activation;
  stem_conv2d_kernel<Traits><<<static_cast<unsigned>(cut.blocks), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const StemConv2dParams& p, const Device& device, cudaStream_t stream) {
#define DWSWAP_CASE(K)                                                                        \
  case K:                                                                                     \
    return p.activation <= Activation::kRelu6 ? launch<Traits<T, K, true>>(p, device, stream) \
                                              : launch<Traits<T, K, false>>(p, device, stream);
  switch (p.channels) {
    DWSWAP_CASE(8)
    DWSWAP_CASE(16)
    DWSWAP_CASE(24)
    DWSWAP_CASE(32)
    DWSWAP_CASE(40)
    DWSWAP_CASE(48)
    DWSWAP_CASE(56)
    DWSWAP_CASE(64)
    default:
      return cudaErrorInvalidValue;
  }
#undef DWSWAP_CASE
}
static_assert(Activation::kNone < Activation::kRelu && Activation::kRelu < Activation::kRelu6);

}  // namespace stem
}  // namespace dwswap
