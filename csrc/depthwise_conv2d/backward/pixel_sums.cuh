// channels_last, the gradients of weight and bias of few pixels, kernel sizes known at compile
// time, any stride and dilation, any number of channels and any alignment.
//
//   grad_weight[k] = sum over n and o of grad_output[o] input[stride o + dilation k - padding]
//
// So little is done that launches and waits for memory are the time. A block has all pixels of
// some channels for a row of taps, so that no second kernel adds up shares; other rows of taps are
// for other multiprocessors, which read the same from the cache. Its rows of threads take the
// pixels in turn, kPixels at once, and load all that these need before they use the first. Then
// they add up their sums, those of a warp first: always in the same order.
//
// An infinity or a NaN reaches the sums of its own channel alone.
#pragma once

#include "common/alignment.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/sum.cuh"
#include "common/warp_sums.cuh"
#include "depthwise_conv2d/backward/pixel_sums.h"
#include "depthwise_conv2d/backward/sums.cuh"

namespace dwswap {
namespace pixel_sums {

constexpr int kWarpRows = 32 / kLanes;

template <typename T_, int CHANNELS_, int K_>
struct Traits {
  using T = T_;
  static constexpr int kChannels = CHANNELS_;  // of a thread
  static constexpr int kKernel = K_;
  // At once: so many that (K + 1) loads of each fit the 64 registers of 1024 threads.
  static constexpr int kPixels = K_ == 3 ? 4 : 2;
  // A row of taps and the bias, filled up for add_up_warp.
  static constexpr int kSums = static_cast<int>(ceil_div(K_ + 1, kWarpRows)) * kWarpRows;
  static constexpr int kBlockChannels = kLanes * CHANNELS_;
};

struct Arguments {
  const void* grad_output;
  const void* input;
  int channels, pixels, in_h, in_w;  // pixels of grad_output, of all images
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Divisor by_columns, by_rows, by_warps;
};

template <typename Traits>
__global__ void __launch_bounds__(kMaxThreads)
    kernel(const Arguments a, const Gradients<typename Traits::T> target) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, V = Traits::kChannels, PIXELS = Traits::kPixels;
  constexpr int SUMS = Traits::kSums, BLOCK_CHANNELS = Traits::kBlockChannels;
  constexpr int VALUES = SUMS * BLOCK_CHANNELS;
  const auto lane = static_cast<int>(threadIdx.x % kLanes);
  const auto row = static_cast<int>(threadIdx.x / kLanes);
  const auto rows = static_cast<int>(blockDim.x / kLanes);
  const int first_channel = static_cast<int>(blockIdx.x) * BLOCK_CHANNELS;
  const int c = first_channel + lane * V;
  const auto kh = static_cast<int>(blockIdx.y);
  const int top = kh * a.dilation_h - a.padding_h, step = a.dilation_w * a.channels;
  const auto* const grad_output = static_cast<const T*>(a.grad_output);
  const auto* const input = static_cast<const T*>(a.input);
  // Threads without channels stay for the barriers.
  const int end = c < a.channels ? a.pixels : 0;

  // [tap][channel], then the sums of grad_output. Short enough to be plain: see kMostChain.
  float sums[SUMS * V] = {};
#pragma unroll 1
  for (int first = row; first < end; first += PIXELS * rows) {
    Words<T, V> grad[PIXELS] = {}, x[PIXELS][K] = {};
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int pixel = first + i * rows;
      if (pixel >= end) continue;
      grad[i] = load_words<V>(grad_output + (pixel * a.channels + c));
      uint32_t oh, ow;
      const auto n = static_cast<int>(a.by_rows.divide(a.by_columns.divide(pixel, &ow), &oh));
      const int ih = static_cast<int>(oh) * a.stride_h + top;
      const int iw = static_cast<int>(ow) * a.stride_w - a.padding_w;
      const bool inside = static_cast<unsigned>(ih) < static_cast<unsigned>(a.in_h);
      const int place = ((n * a.in_h + ih) * a.in_w + iw) * a.channels + c;
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        if (inside && static_cast<unsigned>(iw + kw * a.dilation_w) < static_cast<unsigned>(a.in_w))
          x[i][kw] = load_words<V>(input + (place + kw * step));
      }
    }
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      float g[V];
      widen_all(grad[i], g);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        float value[V];
        widen_all(x[i][kw], value);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[kw * V + v] += g[v] * value[v];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sums[K * V + v] += g[v];
    }
  }

  // The stride is odd, so that neighbours are in other banks.
  __shared__ float partials[VALUES][kMaxThreads / 32 + 1];
  add_up_warp<kLanes>(sums);
  constexpr int HELD = SUMS / kWarpRows;
#pragma unroll
  for (int i = 0; i < HELD * V; ++i) {
    const int sum = row % kWarpRows * HELD + i / V;
    partials[sum * BLOCK_CHANNELS + lane * V + i % V][threadIdx.x / 32] = sums[i];
  }
  __syncthreads();
  // 32 of them side by side: a value has as many threads as there are warps.
  static_assert(VALUES % 32 == 0, "all threads of a warp take part in each shuffle");
  constexpr int OWN = VALUES / 32;
  uint32_t warp;
  const auto first_value = static_cast<int>(a.by_warps.divide(threadIdx.x, &warp));
  float totals[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) totals[i] = partials[first_value + 32 * i][warp];
  for (int offset = static_cast<int>(a.by_warps.value) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < OWN; ++i) totals[i] += shuffled(totals[i], offset);
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int value = first_value + 32 * i;
    const int channel = first_channel + value % BLOCK_CHANNELS, sum = value / BLOCK_CHANNELS;
    if (warp != 0 || channel >= a.channels || sum > K || (sum == K && kh != 0)) continue;
    target.set(channel, sum == K ? K * K : kh * K + sum, totals[i]);
  }
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, cudaStream_t stream) {
  using T = typename Traits::T;
  Arguments a{};
  a.grad_output = p.grad_output, a.input = p.input;
  a.channels = static_cast<int>(p.channels);
  a.pixels = static_cast<int>(p.batch * p.out_h * p.out_w);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  int rows = kWarpRows;
  while (rows < a.pixels && rows < kMaxRows) rows *= 2;
  a.by_columns = Divisor(static_cast<uint32_t>(p.out_w));
  a.by_rows = Divisor(static_cast<uint32_t>(p.out_h));
  a.by_warps = Divisor(static_cast<uint32_t>(rows / kWarpRows));
  const auto slices = static_cast<unsigned>(ceil_div(p.channels, Traits::kBlockChannels));
  kernel<Traits>
      <<<dim3(slices, Traits::kKernel), rows * kLanes, 0, stream>>>(a, Sums<T>(p, 1).gradients);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, cudaStream_t stream) {
  const bool pairs = aligned_to(2 * sizeof(T), p.channels * sizeof(T), {p.grad_output, p.input});
#define DWSWAP_CASE(K)                                      \
  if (p.kernel_w == K) {                                    \
    if constexpr (sizeof(T) == 2) {                         \
      if (pairs) return launch<Traits<T, 2, K>>(p, stream); \
    }                                                       \
    return launch<Traits<T, 1, K>>(p, stream);              \
  }
  DWSWAP_CASE(3)
  DWSWAP_CASE(5)
  DWSWAP_CASE(7)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

}  // namespace pixel_sums
}  // namespace dwswap
