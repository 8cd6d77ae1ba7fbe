// A depthwise convolution in channels_last and the pointwise one behind it, for few pixels: one
// image, or a few small ones. sm_90 and later.
//
// Two kernels otherwise, of which each takes longer than its bytes do, and what lies between them
// is written and read. Here a block has a few pixels and a slice of the channels. Its threads
// compute the depthwise convolution, four channels of two pixels each, straight from global memory,
// and leave it, rounded, in shared memory; meanwhile the slice of the pointwise weights arrives
// there. Matrix instructions multiply the two: outputs are the rows of their product and pixels its
// columns, as there are few of those. The slices of all channels are the blocks of a cluster, which
// give each other their sums: each block finishes a share of the outputs.
//
// A network of small kernels fetches the code of each anew, so that half of it was worth 3 us of
// the 138 that a MobileNetV2 took: hence the loops that are not unrolled.
//
// Rows of weights and of pixels are read in the same order, 16 bytes for each lane: lane t of four
// has channels 8 t to 8 t + 7 of every 32, of which the first four are its own in the first of two
// instructions, and the others in the second.
#pragma once

#include <cooperative_groups.h>

#include "common/async_copy.cuh"
#include "common/integer.h"
#include "common/matrix.cuh"
#include "common/numeric.cuh"
#include "depthwise_conv2d/channel_pairs.cuh"
#include "depthwise_conv2d/form.cuh"
#include "separable_conv2d/cut.h"
#include "separable_conv2d/launch.h"
#include "separable_conv2d/params.h"

namespace dwswap {
namespace separable {

constexpr int kWarp = 32, kThreads = kWarps * kWarp;
constexpr int kChannels = 4;  // of a thread
constexpr int kVector = 8;    // elements, 16 bytes
static_assert(kMostChannels == kThreads * kVector);

template <typename T_, int KERNEL_, int STRIDE_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = KERNEL_, kStride = STRIDE_;
  static constexpr int kInputColumns = (kPair - 1) * STRIDE_ + KERNEL_;
  // Of a multiprocessor. One is enough, and with nothing said the compiler spills to have two; but
  // for 5 x 5 taps with stride 2, told so, it plans with more registers than there are, and with
  // nothing said it takes 184.
  static constexpr int kMinBlocks = KERNEL_ * STRIDE_ < 10 ? 1 : 0;
};

struct Arguments {
  const void *input, *weight, *bias, *input_bias, *point_weight, *point_bias, *residual;
  void* output;
  int channels, outputs, in_h, in_w, out_w, padding_h, padding_w;
  int pairs;                                        // of all blocks
  int pixels, slice, padded, pitch, slices, share;  // as Cut has them
  int units;                                        // products of kRows x kColumns
  int parts, part;                                  // of the channels of a unit, for warps each
  Divisor by_row_pairs, by_out_h, by_channels, by_vectors, by_row_blocks, by_slices;
  Activation input_activation, activation;
};

// What a thread reads for its pair of pixels: four channels of each, and their biases.
template <typename Traits>
struct Window {
  using Channels = Words<typename Traits::T, kChannels>;
  Channels x[Traits::kKernel][Traits::kInputColumns];
  Channels bias, input_bias;
  uint32_t rows, columns;  // bit i: row or column i lies in the image
};

template <typename Traits>
__device__ __forceinline__ void fetch(const Arguments& a, int pair, int channel,
                                      Window<Traits>& window) {
  using T = typename Traits::T;
  uint32_t oh, half;
  const auto n = static_cast<int>(
      a.by_out_h.divide(a.by_row_pairs.divide(static_cast<uint32_t>(pair), &half), &oh));
  const int ih = static_cast<int>(oh) * Traits::kStride - a.padding_h;
  const int iw = static_cast<int>(half) * kPair * Traits::kStride - a.padding_w;
  const T* row =
      static_cast<const T*>(a.input) + ((n * a.in_h + ih) * a.in_w + iw) * a.channels + channel;
  window.columns = columns_inside<Traits::kInputColumns>(iw, a.in_w, Traits::kInputColumns);
  window.rows = columns_inside<Traits::kKernel>(ih, a.in_h, Traits::kKernel);
#pragma unroll
  for (int i = 0; i < Traits::kKernel; ++i) {
    const uint32_t inside = (window.rows >> i & 1) != 0 ? window.columns : 0;
#pragma unroll
    for (int j = 0; j < Traits::kInputColumns; ++j)
      load_where((inside >> j & 1) != 0, row + j * a.channels, window.x[i][j]);
    row += a.in_w * a.channels;
  }
  window.bias = window.input_bias = {};
  load_where(a.bias != nullptr, static_cast<const T*>(a.bias) + channel, window.bias);
  load_where(a.input_bias != nullptr, static_cast<const T*>(a.input_bias) + channel,
             window.input_bias);
}

// The depthwise convolution of four channels of a pair of pixels.
template <typename Traits, typename T>
__device__ __forceinline__ void convolve(const Arguments& a, const Window<Traits>& window,
                                         const T* taps, Words<T, kChannels> (&y)[kPair]) {
  constexpr int K = Traits::kKernel, COLUMNS = Traits::kInputColumns;
  float bias[kChannels], input_bias[kChannels];
  widen_all(window.bias, bias), widen_all(window.input_bias, input_bias);
  const InputForm<Form::kClamp, T, kChannels> input_form(input_bias, a.input_activation);
  // Widened row by row: all of 5 x 5 taps would need 100 registers.
  Words<T, kChannels> packed[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) packed[i] = load_words<kChannels>(taps + i * kChannels);
  float sums[kPair][kChannels] = {};
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float w[kChannels][K];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int tap = c * K * K + i * K + j;
        const float2 both = widen_pair<T>(packed[tap / kChannels].data[tap % kChannels / 2]);
        w[c][j] = tap % 2 == 0 ? both.x : both.y;
      }
      const float start = input_form.start(c, i == 0 ? bias[c] : 0.0f, w[c]);
#pragma unroll
      for (int pixel = 0; pixel < kPair; ++pixel) sums[pixel][c] += start;
    }
    float x[COLUMNS * kChannels];
    input_form.template apply<COLUMNS, true>([&](int j) { return window.x[i][j]; },
                                             (window.rows >> i & 1) != 0 ? window.columns : 0,
                                             a.input_activation, x);
#pragma unroll
    for (int pixel = 0; pixel < kPair; ++pixel) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          sums[pixel][c] += x[(pixel * Traits::kStride + j) * kChannels + c] * w[c][j];
      }
    }
  }
  const OutputForm<Form::kClamp, T, kChannels> output_form(a.activation);
#pragma unroll
  for (int pixel = 0; pixel < kPair; ++pixel) y[pixel] = output_form.apply(sums[pixel]);
}

// What a lane loads and stores of a unit: two outputs of a pixel in the upper half of its rows, and
// two in the lower half.
struct Place {
  int output, offset;  // the first of them, and its element of the tensor
  bool has[2];
};
__device__ __forceinline__ Place place_of(const Arguments& a, int unit, int first_pair) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t block, half;
  const auto column = static_cast<int>(a.by_row_blocks.divide(static_cast<uint32_t>(unit), &block));
  const int pixel = column * kColumns + lane / 4, pair = first_pair + pixel / kPair;
  const auto row = static_cast<int>(a.by_row_pairs.divide(static_cast<uint32_t>(pair), &half));
  const int ow = static_cast<int>(half) * kPair + pixel % kPair;
  Place place{};
  place.output = static_cast<int>(block) * kRows + lane % 4 * 2;
  place.offset = (row * a.out_w + ow) * a.outputs + place.output;
  place.has[0] = unit < a.units && pair < a.pairs && ow < a.out_w;
  place.has[1] = place.has[0] && place.output + kRows / 2 < a.outputs;
  return place;
}

// The slice of the pointwise weights, with zeros behind its channels.
template <typename T>
__device__ __forceinline__ void copy_weights(const Arguments& a, T* weights, int first_channel,
                                             int channels) {
  uint32_t vector;
  const auto row = static_cast<int>(a.by_vectors.divide(threadIdx.x, &vector));
  const int channel = static_cast<int>(vector) * kVector;
  const bool inside = channel < channels;
  const T* const source =
      static_cast<const T*>(a.point_weight) + first_channel + (inside ? channel : 0);
  const int rows = kThreads / static_cast<int>(a.by_vectors.value);
  if (row >= rows) return;
#pragma unroll 1
  for (int output = row; output < a.outputs; output += rows)
    copy_async<kVectorBytes>(weights + output * a.pitch + channel, source + output * a.channels,
                             inside ? kVectorBytes : 0);
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks)
    separable_conv2d_kernel(const __grid_constant__ Arguments a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kKernel * Traits::kKernel;
  extern __shared__ __align__(kVectorBytes) unsigned char shared[];
  T* const taps = reinterpret_cast<T*>(shared);
  T* const weights = taps + a.slice * kTaps;
  T* const hidden = weights + a.outputs * a.pitch;
  float4* const sums = reinterpret_cast<float4*>(hidden + a.pixels * a.pitch);

  const cg::cluster_group cluster = cg::this_cluster();
  cluster.barrier_arrive();
  const auto thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(cluster.block_rank());
  const int first_channel = rank * a.slice;
  const int channels = min(a.slice, a.channels - first_channel);
  const int first_pair = static_cast<int>(blockIdx.x) / a.slices * (a.pixels / kPair);

  const T* const own_taps = static_cast<const T*>(a.weight) + first_channel * kTaps;
#pragma unroll 1
  for (int i = thread * kVector; i < channels * kTaps; i += kThreads * kVector)
    copy_async<kVectorBytes>(taps + i, own_taps + i, kVectorBytes);
  commit_copies();

  const int tasks = a.pixels / kPair * (a.padded / kChannels);
#pragma unroll 1
  for (int begin = 0; begin < tasks; begin += kThreads) {
    uint32_t rest;
    const int task = begin + thread;
    const auto pair = static_cast<int>(a.by_channels.divide(static_cast<uint32_t>(task), &rest));
    const int channel = static_cast<int>(rest) * kChannels;
    const bool computes = task < tasks && channel < channels;
    Window<Traits> window;
    // Pixels behind the last one are computed and not written.
    if (computes) fetch(a, min(first_pair + pair, a.pairs - 1), first_channel + channel, window);
    if (begin == 0) {
      // Behind the loads that the convolution waits for.
      copy_weights(a, weights, first_channel, channels);
      commit_copies();
      wait_for_groups<1>();
      __syncthreads();
    }
    Words<T, kChannels> words[kPair] = {};
    if (computes) convolve(a, window, taps + channel * kTaps, words);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      if (task < tasks) store_words(hidden + (pair * kPair + i) * a.pitch + channel, words[i]);
    }
  }
  wait_for_copies();
  __syncthreads();
  cluster.barrier_wait();  // until all blocks have begun, and have shared memory

  const int lane = thread % kWarp, warp = thread / kWarp, t = lane % 4;
#pragma unroll 1
  for (int i = warp; i < a.units * a.parts; i += kWarps) {
    const int unit = a.parts == 1 ? i : i % a.units, part = a.parts == 1 ? 0 : i / a.units;
    uint32_t block;
    const auto column =
        static_cast<int>(a.by_row_blocks.divide(static_cast<uint32_t>(unit), &block));
    const int upper = static_cast<int>(block) * kRows + lane / 4;
    // The outputs are a multiple of 8: the lower half of the last rows may be none of them.
    const int lower = min(upper + kRows / 2, a.outputs - 1);
    const T* const upper_row = weights + upper * a.pitch + t * kVector;
    const T* const lower_row = weights + lower * a.pitch + t * kVector;
    const T* const pixel_row = hidden + (column * kColumns + lane / 4) * a.pitch + t * kVector;
    float even[4] = {}, odd[4] = {};
    const int end = min(a.padded, (part + 1) * a.part);
#pragma unroll 1
    for (int c = part * a.part; c < end; c += kStep) {
      const auto up = load_words<kVector>(upper_row + c), low = load_words<kVector>(lower_row + c);
      const auto x = load_words<kVector>(pixel_row + c);
      multiply_add<T>(even, {up.data[0], low.data[0], up.data[1], low.data[1]},
                      {x.data[0], x.data[1]});
      multiply_add<T>(odd, {up.data[2], low.data[2], up.data[3], low.data[3]},
                      {x.data[2], x.data[3]});
    }
    uint32_t owner;
    const auto place = static_cast<int>(a.by_slices.divide(static_cast<uint32_t>(unit), &owner));
    float4* const target = cluster.map_shared_rank(sums, owner) +
                           ((rank * a.parts + part) * a.share + place) * kWarp + lane;
    *target = {even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]};
  }

#pragma unroll 1
  for (int i = warp; i == warp || i < a.share; i += kWarps) {
    const Place at = place_of(a, i * a.slices + rank, first_pair);
    Words<T, 2> residual[2] = {};
    const T* const source = static_cast<const T*>(a.residual) + at.offset;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      load_where(a.residual != nullptr && at.has[h], source + h * (kRows / 2), residual[h]);
    // The loads of the first ones do not wait for the sums.
    if (i == warp) cluster.sync();
    float total[4] = {};
    if (i < a.share) {
#pragma unroll 4
      for (int from = 0; from < a.slices * a.parts; ++from) {
        const float4 x = sums[(from * a.share + i) * kWarp + lane];
        total[0] += x.x, total[1] += x.y, total[2] += x.z, total[3] += x.w;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = at.output - 2 * t + lane / 4 + h * (kRows / 2);
      const bool has_bias = a.point_bias != nullptr && channel < a.outputs;
      const float bias = has_bias ? widen(static_cast<const T*>(a.point_bias)[channel]) : 0.0f;
      const float2 x = widen_pair<T>(transposed(residual[h].data[0]));
      const uint32_t y =
          transposed(narrow_pair<T>(total[2 * h] + bias + x.x, total[2 * h + 1] + bias + x.y));
      if (at.has[h])
        store_words(static_cast<T*>(a.output) + at.offset + h * (kRows / 2), Words<T, 2>{y});
    }
  }
#endif
}

template <typename Traits>
cudaError_t launch(const SeparableConv2dParams& p, const Device& device, cudaStream_t stream) {
  const Cut cut = cut_of(p);
  const DepthwiseConv2dParams& d = p.depthwise;
  const auto number = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
  Arguments a{};
  a.input = d.input, a.weight = d.weight, a.bias = d.bias, a.input_bias = d.input_bias;
  a.point_weight = p.point_weight, a.point_bias = p.point_bias;
  a.residual = p.residual, a.output = p.output;
  a.channels = static_cast<int>(d.channels), a.outputs = static_cast<int>(p.outputs);
  a.in_h = static_cast<int>(d.in_h), a.in_w = static_cast<int>(d.in_w);
  a.out_w = static_cast<int>(d.out_w);
  a.padding_h = static_cast<int>(d.padding_h), a.padding_w = static_cast<int>(d.padding_w);
  a.pairs = static_cast<int>(pairs_of(p));
  a.pixels = cut.pixels, a.slice = cut.channels, a.slices = cut.slices;
  a.padded = cut.padded(), a.pitch = cut.pitch(), a.share = cut.share(p.outputs);
  a.units = cut.units(p.outputs), a.parts = cut.parts(p.outputs);
  a.part = static_cast<int>(ceil_div(a.padded / kStep, a.parts)) * kStep;
  a.by_row_pairs = number(ceil_div(d.out_w, kPair)), a.by_out_h = number(d.out_h);
  a.by_channels = number(a.padded / kChannels), a.by_vectors = number(a.padded / kVector);
  a.by_row_blocks = number(ceil_div(p.outputs, kRows)), a.by_slices = number(a.slices);
  a.input_activation = d.input_activation, a.activation = d.activation;

  const auto function = separable_conv2d_kernel<Traits>;
  const cudaError_t status = allow_shared_memory(function, device);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cut.slices), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cut.tiles * cut.slices));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes =
      static_cast<size_t>(cut.bytes(p.outputs, Traits::kKernel * Traits::kKernel));
  config.stream = stream;
  config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, function, a);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const SeparableConv2dParams& p, const Device& device,
                         cudaStream_t stream) {
  const DepthwiseConv2dParams& d = p.depthwise;
#define DWSWAP_CASE(K, S) \
  if (d.kernel_h == K && d.stride_h == S) return launch<Traits<T, K, S>>(p, device, stream);
  DWSWAP_CASE(3, 1)
  DWSWAP_CASE(3, 2)
  DWSWAP_CASE(5, 1)
  DWSWAP_CASE(5, 2)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

}  // namespace separable
}  // namespace dwswap
