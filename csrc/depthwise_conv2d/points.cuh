// 3 x 3, any stride and dilation, both layouts, any number of channels and any alignment.
//
// For problems so small that the time is that of a launch and of waiting for memory: a thread has
// one pixel, of a channel or in channels_last of two neighbouring ones, and asks for all that it
// needs at once. Lanes run over what is consecutive in memory. Where that is the channels, taps are
// read by the block, in their order: one by one, those of a warp would be in 9 lines each.
#pragma once

#include <algorithm>

#include "common/alignment.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/channel_pairs.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/points.h"

namespace dwswap {
namespace points {

template <typename T_, int CHANNELS_, Layout LAYOUT_, Form FORM_>
struct Traits {
  using T = T_;
  static constexpr int kChannels = CHANNELS_;  // of a thread
  static constexpr bool kChannelsLast = LAYOUT_ == Layout::kChannelsLast;
  static constexpr Form kForm = FORM_;  // kRelu is kClamp
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, in_h, in_w;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  uint32_t vectors, pixels;  // of a pixel or of a sample, and in all
  uint32_t lane_bits;        // channels_last: of the lanes that a block has along the channels
  Divisor by_slices, by_planes, by_columns, by_rows;
  bool reversed_taps;
  Activation input_activation, activation;
};

// What a thread computes.
template <typename Traits>
struct Point {
  bool exists;
  uint32_t slice, lane;  // channels_last: of the channels
  int n, c;
  uint32_t row, column;
  int place;  // in the output

  __device__ __forceinline__ explicit Point(const Arguments& a) {
    uint32_t vector, pixel;
    if constexpr (Traits::kChannelsLast) {
      const uint32_t tile = a.by_slices.divide(blockIdx.x, &slice);
      lane = threadIdx.x & ((1u << a.lane_bits) - 1);
      vector = (slice << a.lane_bits) + lane;
      pixel = tile * (kThreads >> a.lane_bits) + (threadIdx.x >> a.lane_bits);
      n = static_cast<int>(a.by_rows.divide(a.by_columns.divide(pixel, &column), &row));
      exists = vector < a.vectors && pixel < a.pixels;
    } else {
      slice = lane = 0;
      pixel = blockIdx.x * kThreads + threadIdx.x;
      const uint32_t plane = a.by_rows.divide(a.by_columns.divide(pixel, &column), &row);
      n = static_cast<int>(a.by_planes.divide(plane, &vector));
      exists = pixel < a.pixels;
    }
    c = static_cast<int>(vector) * Traits::kChannels;
    place = static_cast<int>(pixel) * (Traits::kChannelsLast ? a.channels : 1) +
            (Traits::kChannelsLast ? c : 0);
  }
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = kKernel, V = Traits::kChannels, TAPS = K * K;
  constexpr Form FORM = Traits::kForm;
  const Point<Traits> point(a);
  const int ih = static_cast<int>(point.row) * a.stride_h - a.padding_h;
  const int iw = static_cast<int>(point.column) * a.stride_w - a.padding_w;
  // From column to column, and the first pixel of the window.
  const int pitch = Traits::kChannelsLast ? a.channels : 1;
  const int first = Traits::kChannelsLast
                        ? ((point.n * a.in_h + ih) * a.in_w + iw) * a.channels + point.c
                        : ((point.n * a.channels + point.c) * a.in_h + ih) * a.in_w + iw;
  const T* const source = static_cast<const T*>(a.input) + first;
  const int step_h = a.dilation_h * a.in_w * pitch, step_w = a.dilation_w * pitch;

  Words<T, V> window[TAPS] = {};
  uint32_t inside = 0;
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
    const bool row_inside = point.exists && static_cast<unsigned>(ih + kh * a.dilation_h) <
                                                static_cast<unsigned>(a.in_h);
#pragma unroll
    for (int kw = 0; kw < K; ++kw) {
      const bool wanted = row_inside && static_cast<unsigned>(iw + kw * a.dilation_w) <
                                            static_cast<unsigned>(a.in_w);
      load_where(wanted, source + (kh * step_h + kw * step_w), window[kh * K + kw]);
      if (wanted) inside |= 1u << (kh * K + kw);
    }
  }
  float taps[V][TAPS], bias[V] = {}, input_bias[V] = {};
  if (point.exists && a.bias != nullptr) load(static_cast<const T*>(a.bias) + point.c, bias);
  if (point.exists && a.input_bias != nullptr)
    load(static_cast<const T*>(a.input_bias) + point.c, input_bias);
  const auto* weight = static_cast<const T*>(a.weight);
  if constexpr (Traits::kChannelsLast) {
    constexpr int MOST = kMostLanes * TAPS, STEPS = (MOST + kThreads - 1) / kThreads;
    __shared__ __align__(16) T shared[MOST * V];
    const uint32_t before = point.slice << a.lane_bits;
    const uint32_t words = min(1u << a.lane_bits, a.vectors - before) * TAPS;
    Words<T, V> own[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const uint32_t word = threadIdx.x + i * kThreads;
      load_where(word < words, weight + (before * TAPS + word) * V, own[i]);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const uint32_t word = threadIdx.x + i * kThreads;
      if (word < words) store_words<V>(shared + word * V, own[i]);
    }
    __syncthreads();
    if (!point.exists) return;
    load_taps(shared + point.lane * (V * TAPS), taps, a.reversed_taps);
  } else {
    if (!point.exists) return;
    load_taps(weight + point.c * TAPS, taps, a.reversed_taps);
  }

  const InputForm<FORM, T, V> input_form(input_bias, a.input_activation);
  float x[TAPS * V], sums[V];
  input_form.template apply<TAPS, FORM != Form::kPlain>([&](int i) { return window[i]; }, inside,
                                                        a.input_activation, x);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sums[v] = input_form.start(v, bias[v], taps[v]);
#pragma unroll
    for (int t = 0; t < TAPS; ++t) sums[v] += x[t * V + v] * taps[v][t];
  }
  if constexpr (FORM == Form::kAny) activate(sums, a.activation);
  store_words<V>(static_cast<T*>(a.output) + point.place,
                 OutputForm<FORM, T, V>(a.activation).apply(sums));
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  const int64_t vectors = ceil_div(p.channels, Traits::kChannels);
  const int64_t pixels = p.batch * p.out_h * p.out_w * (Traits::kChannelsLast ? 1 : p.channels);
  while (1 << a.lane_bits < std::min<int64_t>(vectors, kMostLanes)) ++a.lane_bits;
  const int64_t slices = Traits::kChannelsLast ? ceil_div(vectors, int64_t{1} << a.lane_bits) : 1;
  const int64_t block_pixels = Traits::kChannelsLast ? kThreads >> a.lane_bits : kThreads;
  a.vectors = static_cast<uint32_t>(vectors), a.pixels = static_cast<uint32_t>(pixels);
  a.by_slices = Divisor(static_cast<uint32_t>(slices));
  a.by_planes = Divisor(static_cast<uint32_t>(p.channels));
  a.by_columns = Divisor(static_cast<uint32_t>(p.out_w));
  a.by_rows = Divisor(static_cast<uint32_t>(p.out_h));
  a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;
  const auto blocks = static_cast<unsigned>(slices * ceil_div(pixels, block_pixels));
  kernel<Traits><<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  return visit_form(form_of(p), [&](auto form) {
    constexpr Form FOUND = decltype(form)::value;
    constexpr Form FORM = FOUND == Form::kRelu ? Form::kClamp : FOUND;
    if (p.in_layout == Layout::kContiguous)
      return launch<Traits<T, 1, Layout::kContiguous, FORM>>(p, stream);
    // Pairs of float32 were slower: half as many threads.
    if constexpr (sizeof(T) == 2) {
      if (aligned_to(2 * sizeof(T), p.channels * sizeof(T),
                     {p.input, p.weight, p.bias, p.input_bias, p.output}))
        return launch<Traits<T, 2, Layout::kChannelsLast, FORM>>(p, stream);
    }
    return launch<Traits<T, 1, Layout::kChannelsLast, FORM>>(p, stream);
  });
}

}  // namespace points
}  // namespace dwswap
