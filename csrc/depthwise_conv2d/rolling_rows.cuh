// NCHW, stride 1 and 2, kernel sizes known at compile time, for small problems and for what
// plane_strips leaves: a channel multiplier, much padding, tensors that are not aligned to 16
// bytes.
//
// One thread computes kRows rows of one output column, a dilation apart, so that they share the
// rows of input that they see. It loads all its inputs before it uses the first, and so waits for
// memory once; each is converted once and used by every output row whose window holds it.
// Neighbouring threads read neighbouring columns, so loads coalesce and the overlap of windows is
// served by L1.
#pragma once

#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/rolling_rows_cut.h"

namespace dwswap {
namespace rolling_rows {

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int multiplier, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int dilation_h, dilation_w;  // of dilated kernels
  uint32_t threads;
  Divisor by_out_w, by_strips, by_channels;
  bool transforms_input, reversed_taps;
  Activation input_activation, activation;
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, ROWS = Traits::kRows;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.threads) return;
  uint32_t ow, strip, k;
  const uint32_t plane = a.by_strips.divide(a.by_out_w.divide(index, &ow), &strip);
  a.by_channels.divide(plane, &k);
  const int64_t in_plane = plane / a.multiplier;
  const int dilation_h = Traits::kDilated ? a.dilation_h : 1;
  const int dilation_w = Traits::kDilated ? a.dilation_w : 1;
  // Several rows a dilation apart begin at each of the first dilation_h rows, and so on below them.
  const int row_step = ROWS == 1 ? 1 : dilation_h;
  const int oh = strip / row_step * (row_step * ROWS) + strip % row_step;
  const int ih = oh * S - a.padding_h;
  const int iw = ow * S - a.padding_w;

  const auto* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(k) * K * K;
  float taps[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) taps[i] = widen(weight[i]);
  reverse_where(a.reversed_taps, taps);
  const float bias = a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[k]);
  const float input_bias =
      a.input_bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.input_bias)[k / a.multiplier]);
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sums[r] = bias;

  // Offsets within a plane and its padding fit 32 bits (covers_rolling_rows).
  const T* input = static_cast<const T*>(a.input) + in_plane * a.in_h * a.in_w;
  int offset = ih * a.in_w + iw;
  // All loads before the first use: a thread waits for memory once.
  float x[Traits::kInputRows][K];
#pragma unroll
  for (int i = 0; i < Traits::kInputRows; ++i, offset += dilation_h * a.in_w) {
    const bool row_inside =
        static_cast<unsigned>(ih + i * dilation_h) < static_cast<unsigned>(a.in_h);
#pragma unroll
    for (int kw = 0; kw < K; ++kw) {
      const bool inside =
          row_inside && static_cast<unsigned>(iw + kw * dilation_w) < static_cast<unsigned>(a.in_w);
      x[i][kw] = inside ? widen(input[offset + kw * dilation_w]) : 0.0f;
    }
  }
  // Out of the way of what has none: its code is the most of the kernel, and has to be fetched.
  if (a.transforms_input) [[unlikely]] {
#pragma unroll
    for (int i = 0; i < Traits::kInputRows; ++i) {
      const bool row_inside =
          static_cast<unsigned>(ih + i * dilation_h) < static_cast<unsigned>(a.in_h);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) x[i][kw] += input_bias;
      activate(x[i], a.input_activation);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        const bool inside = row_inside && static_cast<unsigned>(iw + kw * dilation_w) <
                                              static_cast<unsigned>(a.in_w);
        if (!inside) x[i][kw] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kInputRows; ++i) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int kh = i - r * S;
      if (kh < 0 || kh >= K) continue;
#pragma unroll
      for (int kw = 0; kw < K; ++kw) sums[r] += x[i][kw] * taps[kh * K + kw];
    }
  }

  activate(sums, a.activation);
  T* output = static_cast<T*>(a.output) + static_cast<int64_t>(plane) * a.out_h * a.out_w +
              oh * a.out_w + ow;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (oh + r * row_step < a.out_h) output[r * row_step * a.out_w] = narrow<T>(sums[r]);
  }
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const auto strips = static_cast<uint32_t>(strips_of(p, Traits::kRows));
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.multiplier = static_cast<int>(p.multiplier);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.threads = static_cast<uint32_t>(p.batch * p.out_channels() * strips * p.out_w);
  a.by_out_w = Divisor(static_cast<uint32_t>(p.out_w)), a.by_strips = Divisor(strips);
  a.by_channels = Divisor(static_cast<uint32_t>(p.out_channels()));
  a.transforms_input = p.transforms_input(), a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;
  const auto blocks = static_cast<unsigned>(ceil_div(a.threads, kThreads));
  kernel<Traits><<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  visit<T>(params, [&]<typename Traits>() { status = launch<Traits>(params, stream); });
  return status;
}

}  // namespace rolling_rows
}  // namespace dwswap
