// The first layer of a network in half precision, on the tensor cores: 3 x 3 taps on 3 channels,
// stride 2, padding 1.
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

#include "common/matrix.cuh"
#include "common/numeric.cuh"
#include "stem_conv2d/cut.h"
#include "stem_conv2d/fetch.cuh"
#include "stem_conv2d/launch.h"
#include "stem_conv2d/params.h"

namespace dwswap {
namespace stem {

constexpr int kPitchWords = kPitch / 2;
// Element 0 of what an output sees is at an odd place, the pairs behind it are words.
static_assert(kFirstElement % 2 == 1);

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
  static_assert(CHANNELS_ % 8 == 0 && CHANNELS_ <= kMostChannels,
                "4 registers of taps for each tile");
  // Pixels of an odd number of 16 bytes: chunks would be written in halves of 32 bytes, so that
  // a warp's pixels, which follow each other, go by way of shared memory.
  static constexpr bool kStaged = kTiles % 2 == 1 && kTiles > 1;
  // Of a multiprocessor: 65536 / (8 x 128) = 64 registers for a thread, or 80, or 128. What loads
  // pixels of planes has 24 of them in flight, next to 4 for each tile.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
  // 6 x 14 KiB of shared memory are all that sm_120 has; on sm_80 more blocks spill.
  static constexpr int kBlocks = kTiles <= 6 ? 6 : 4;
#else
  static constexpr int kBlocks = kTiles <= 4 ? 8 : kTiles <= 6 ? 6 : 4;
#endif
};

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
    const float lowest = low_of(activation), highest = high_of(activation);
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

  const Unit u = unit_at(a, blockIdx.x);
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

template <typename Traits>
cudaError_t launch(const StemConv2dParams& p, const Device& device, cudaStream_t stream) {
  const Cut cut = choose_cut(p, device.multiprocessors);
  const Arguments a = arguments_of<typename Traits::T>(p, cut);
  stem_conv2d_kernel<Traits><<<static_cast<unsigned>(cut.units), kThreads, 0, stream>>>(a);
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

}  // namespace stem
}  // namespace dwswap
