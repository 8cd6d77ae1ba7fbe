// NCHW, stride 1 and 2, kernel sizes known at compile time, for small problems and for what
// plane_strips leaves: a channel multiplier, much padding, tensors that are not aligned to 16
// bytes.
//
// One thread computes kRows rows of kColumns neighbouring columns, the rows a dilation apart, so
// that they share the input that they see. It loads all its inputs before it uses the first, and so
// waits for memory once; each is converted once and used by every output whose window holds it.
// Neighbouring threads read neighbouring columns, so loads coalesce and the overlap of windows is
// served by L1.
#pragma once

#include "common/device.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/form.cuh"
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
  int in_h, in_w, out_h, out_w, padding_h, padding_w;
  int dilation_h, dilation_w;  // of dilated kernels
  uint32_t threads;
  Divisor by_groups, by_strips, by_channels, by_multiplier;
  bool transforms_input, reversed_taps;
  Activation input_activation, activation;
};

// Bit i: first + i * step is one of `size`.
template <int N>
__device__ __forceinline__ uint32_t inside_bits(int first, int step, int size) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (static_cast<unsigned>(first + i * step) < static_cast<unsigned>(size)) bits |= 1u << i;
  }
  return bits;
}

// FORM: kPlain, kClamp, which has kRelu, or kAny.
template <typename Traits, Form FORM>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  constexpr int ROWS = Traits::kRows, COLUMNS = Traits::kColumns;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.threads) return;
  uint32_t group, strip, k;  // the group is one of columns
  const uint32_t plane = a.by_strips.divide(a.by_groups.divide(index, &group), &strip);
  a.by_channels.divide(plane, &k);
  uint32_t ignored;
  const int64_t in_plane = a.by_multiplier.divide(plane, &ignored);
  const int dilation_h = Traits::kDilated ? a.dilation_h : 1;
  const int dilation_w = Traits::kDilated ? a.dilation_w : 1;
  // Several rows a dilation apart begin at each of the first dilation_h rows, and so on below them.
  const int row_step = ROWS == 1 ? 1 : dilation_h;
  const int oh = strip / row_step * (row_step * ROWS) + strip % row_step;
  const int ow = static_cast<int>(group) * COLUMNS;
  const int ih = oh * S - a.padding_h;
  const int iw = ow * S - a.padding_w;

  // All loads, as they are in memory, before the first use: a thread waits for memory once. Written
  // as C++, what is loaded where a predicate says so would be converted there, and waited for.
  constexpr int ROWS_IN = Traits::kInputRows, COLUMNS_IN = Traits::kInputColumns;
  using Element = Words<T, 1>;
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(k) * K * K;
  Element raw_taps[K * K], raw_bias{}, raw_input_bias{}, raw[ROWS_IN][COLUMNS_IN] = {};
#pragma unroll
  for (int i = 0; i < K * K; ++i) load_where(true, weight + i, raw_taps[i]);
  load_where(a.bias != nullptr, static_cast<const T*>(a.bias) + k, raw_bias);
  const auto in_channel = a.by_multiplier.divide(k, &ignored);
  load_where(a.input_bias != nullptr, static_cast<const T*>(a.input_bias) + in_channel,
             raw_input_bias);
  // Offsets within a plane and its padding fit 32 bits (covers_rolling_rows).
  const T* input = static_cast<const T*>(a.input) + in_plane * a.in_h * a.in_w + ih * a.in_w + iw;
  const uint32_t columns_inside = inside_bits<COLUMNS_IN>(iw, dilation_w, a.in_w);
  const uint32_t rows_inside = inside_bits<ROWS_IN>(ih, dilation_h, a.in_h);
  const auto is_inside = [&](int i, int c) {
    return (rows_inside >> i & 1) != 0 && (columns_inside >> c & 1) != 0;
  };
#pragma unroll
  for (int i = 0; i < ROWS_IN; ++i) {
    const T* row = input + i * dilation_h * a.in_w;
    const uint32_t inside = (rows_inside >> i & 1) != 0 ? columns_inside : 0;
#pragma unroll
    for (int c = 0; c < COLUMNS_IN; ++c)
      load_where((inside & 1u << c) != 0, row + c * dilation_w, raw[i][c]);
  }

  float taps[K * K], x[ROWS_IN][COLUMNS_IN];
#pragma unroll
  for (int i = 0; i < K * K; ++i) taps[i] = widen(raw_taps[i]);
  reverse_where(a.reversed_taps, taps);
#pragma unroll
  for (int i = 0; i < ROWS_IN; ++i) {
#pragma unroll
    for (int c = 0; c < COLUMNS_IN; ++c) x[i][c] = widen(raw[i][c]);
  }
  float sums[ROWS * COLUMNS];
#pragma unroll
  for (float& sum : sums) sum = widen(raw_bias);
  if (FORM != Form::kPlain && a.transforms_input) {
    const float input_bias = widen(raw_input_bias);
#pragma unroll
    for (int i = 0; i < ROWS_IN; ++i) {
#pragma unroll
      for (float& value : x[i]) value += input_bias;
      if constexpr (FORM == Form::kAny) {
        activate(x[i], a.input_activation);
      } else {
#pragma unroll
        for (float& value : x[i])
          value = clamp(value, low_of(a.input_activation), high_of(a.input_activation));
      }
#pragma unroll
      for (int c = 0; c < COLUMNS_IN; ++c) x[i][c] = is_inside(i, c) ? x[i][c] : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS_IN; ++i) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int kh = i - r * S;
      if (kh < 0 || kh >= K) continue;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int kw = 0; kw < K; ++kw)
          sums[r * COLUMNS + c] += x[i][c * S + kw] * taps[kh * K + kw];
      }
    }
  }

  if constexpr (FORM == Form::kAny) activate(sums, a.activation);
  if constexpr (FORM == Form::kClamp) {
#pragma unroll
    for (float& sum : sums) sum = clamp(sum, low_of(a.activation), high_of(a.activation));
  }
  T* output = static_cast<T*>(a.output) + static_cast<int64_t>(plane) * a.out_h * a.out_w +
              oh * a.out_w + ow;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      if (oh + r * row_step < a.out_h && (COLUMNS == 1 || ow + c < a.out_w))
        output[r * row_step * a.out_w + c] = narrow<T>(sums[r * COLUMNS + c]);
    }
  }
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const auto strips = static_cast<uint32_t>(strips_of(p, Traits::kRows));
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  const auto groups = static_cast<uint32_t>(ceil_div(p.out_w, Traits::kColumns));
  a.threads = static_cast<uint32_t>(p.batch * p.out_channels() * strips * groups);
  a.by_groups = Divisor(groups), a.by_strips = Divisor(strips);
  a.by_channels = Divisor(static_cast<uint32_t>(p.out_channels()));
  a.by_multiplier = Divisor(static_cast<uint32_t>(p.multiplier));
  a.transforms_input = p.transforms_input(), a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;
  const auto blocks = static_cast<unsigned>(ceil_div(a.threads, kThreads));
  return visit_form(form_of(p), [&]<Form FORM>(std::integral_constant<Form, FORM>) {
    // The switch over all activations is most of the code of kAny.
    constexpr Form COMPILED = clamps(FORM)           ? Form::kClamp
                              : FORM == Form::kPlain ? Form::kPlain
                                                     : Form::kAny;
    kernel<Traits, COMPILED><<<blocks, kThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  visit<T>(params, current_device().multiprocessors,
           [&]<typename Traits>() { status = launch<Traits>(params, stream); });
  return status;
}

}  // namespace rolling_rows
}  // namespace dwswap
