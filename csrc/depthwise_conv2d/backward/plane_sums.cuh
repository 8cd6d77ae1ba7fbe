// NCHW, the gradients of weight and bias, stride 1 (with any dilation) and 2, kernel sizes known at
// compile time.
//
//   grad_weight[k] = sum over n and o of grad_output[o] input[stride o + dilation k - padding]
//
// With dilation, a walk has the rows of a phase: those that are a multiple of it apart.
//
// A block has a channel and a share of its columns of grad_output, of all images. A thread walks
// down one column at a time. It loads each row of input that the column sees once, and multiplies
// it by the kSeen rows of grad_output whose windows hold that row, which wait in registers: a step
// of the walk takes kStride rows of input and one of grad_output. The loads of kSteps steps come
// before the first use. In the end the threads of the block add up their sums.
#pragma once

#include <type_traits>

#include "common/integer.h"
#include "common/sum.cuh"
#include "common/warp_sums.cuh"
#include "depthwise_conv2d/backward/plane_sums_cut.h"
#include "depthwise_conv2d/backward/sums.cuh"

namespace dwswap {
namespace plane_sums {

template <typename T_, int K_, int STRIDE_, bool DILATED_>
struct Traits {
  static_assert(STRIDE_ == 1 || !DILATED_, "a dilation of 1");
  using T = T_;
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  // Rows of grad_output that a row of input is seen from.
  static constexpr int kSeen = (K_ + STRIDE_ - 1) / STRIDE_;
  // 7 divides the heights of most networks; registers hold no more than 6 rows of 7 x 7 windows.
  static constexpr int kSteps = STRIDE_ == 1 ? (K_ == 7 ? 6 : 7) : K_ == 3 ? 4 : 2;
  static constexpr int kTaps = K_ * K_;
  static constexpr bool kDilated = DILATED_;
  // The phases take registers, too.
  static constexpr int kMinBlocks = resident_blocks(K_) * (DILATED_ ? 2 : 3) / 3;
};

struct Arguments {
  const void* grad_output;
  const void* input;
  int channels, multiplier;  // of grad_output, per channel of the input
  int in_h, in_w, out_h, out_w, padding_h, padding_w, dilation_h, dilation_w;
  int rows;          // of grad_output, per column
  int items, share;  // columns of a channel, and those of a block
  Divisor by_channels, by_out_w, by_strips, by_dilation;
  Divisor by_step;  // rows of input from a step to the next
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks)
    kernel(const Arguments a, const Sums<typename Traits::T> target) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, SEEN = Traits::kSeen;
  constexpr int STEPS = Traits::kSteps, TAPS = Traits::kTaps;
  constexpr int COUNT = TAPS <= 16 ? 16 : TAPS <= 32 ? 32 : 64;
  uint32_t channel;
  const int share = static_cast<int>(a.by_channels.divide(blockIdx.x, &channel));
  const int in_channels = a.channels / a.multiplier;
  const int in_channel = static_cast<int>(channel) / a.multiplier;
  const int dilation_h = Traits::kDilated ? a.dilation_h : 1;
  const int dilation_w = Traits::kDilated ? a.dilation_w : 1;
  const int in_row = a.in_w * dilation_h, out_row = a.out_w * dilation_h;

  // Tap by tap; the rest stays zero. `bias` adds up what few steps of a walk bring to `grads`.
  float sums[COUNT] = {};
  sum_t<T> bias;
  const int end_item = min(a.items, (share + 1) * a.share);
  for (int item = share * a.share + static_cast<int>(threadIdx.x); item < end_item;
       item += kThreads) {
    uint32_t ow, strip, phase = 0, rest;
    const uint32_t n = a.by_strips.divide(a.by_out_w.divide(item, &ow), &strip);
    int phase_rows = a.out_h;
    if constexpr (Traits::kDilated) {
      strip = a.by_dilation.divide(strip, &phase);
      phase_rows = static_cast<int>(a.by_dilation.divide(a.out_h - 1 - phase + dilation_h, &rest));
    }
    const int first_row = static_cast<int>(strip) * a.rows;
    const int end_row = min(first_row + a.rows, phase_rows);
    const int top = static_cast<int>(phase) - a.padding_h;
    const int iw = static_cast<int>(ow) * S - a.padding_w;
    bool inside[K];
#pragma unroll
    for (int kw = 0; kw < K; ++kw)
      inside[kw] = static_cast<unsigned>(iw + kw * dilation_w) < static_cast<unsigned>(a.in_w);

    // Row q of grad_output, of the phase, is row phase + q dilation. Step q takes the rows of input
    // from top + S q dilation on, and brings row q of grad_output. The first steps, which see the
    // padding alone, are left out.
    const int left_out =
        top < 0 ? static_cast<int>(a.by_step.divide(dilation_h - 1 - top, &rest)) : 0;
    int q = max(first_row, left_out);
    const int end =
        min(end_row + SEEN - 1,
            static_cast<int>(a.by_step.divide(a.in_h - 1 - top + S * dilation_h, &rest)));
    const T* grad_source = static_cast<const T*>(a.grad_output) + ow +
                           (static_cast<int64_t>(n) * a.channels + channel) * a.out_h * a.out_w +
                           ((q - (SEEN - 1)) * dilation_h + static_cast<int>(phase)) * a.out_w;
    const T* source = static_cast<const T*>(a.input) + iw +
                      (static_cast<int64_t>(n) * in_channels + in_channel) * a.in_h * a.in_w +
                      (q * S * dilation_h + top) * a.in_w;
    // Loads come as they are in memory: written as C++, what is loaded where a predicate says so
    // would be converted there, and waited for.
    using Element = Words<T, 1>;
    float grad[SEEN - 1 + STEPS], grads = 0.0f;
    const auto load_grad = [&](int oh, Element& element) {
      load_where(oh >= first_row && oh < end_row, grad_source, element);
      grad_source += out_row;
    };
    const auto take_grad = [&](int i, const Element& element) {
      grad[i] = widen(element);
      grads += grad[i];
    };
    Element first_grads[SEEN - 1] = {};
#pragma unroll
    for (int i = 0; i < SEEN - 1; ++i) load_grad(q - (SEEN - 1) + i, first_grads[i]);
#pragma unroll
    for (int i = 0; i < SEEN - 1; ++i) take_grad(i, first_grads[i]);
    // So many steps, whose rows may lie outside the image.
    const auto advance = [&](auto count, auto checked) {
      constexpr int COUNT = decltype(count)::value;
      Element raw_grad[COUNT] = {}, raw[COUNT * S][K] = {};
#pragma unroll
      for (int i = 0; i < COUNT; ++i) load_grad(q + i, raw_grad[i]);
#pragma unroll
      for (int i = 0; i < COUNT * S; ++i, source += in_row) {
        const int ih = (q * S + i) * dilation_h + top;
        const bool row_inside =
            !decltype(checked)::value ||
            (static_cast<unsigned>(ih) < static_cast<unsigned>(a.in_h) && q + i / S < end);
#pragma unroll
        for (int kw = 0; kw < K; ++kw)
          load_where(row_inside && inside[kw], source + kw * dilation_w, raw[i][kw]);
      }
      float x[COUNT * S][K];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) take_grad(SEEN - 1 + i, raw_grad[i]);
#pragma unroll
      for (int i = 0; i < COUNT * S; ++i) {
#pragma unroll
        for (int kw = 0; kw < K; ++kw) x[i][kw] = widen(raw[i][kw]);
      }
#pragma unroll
      for (int i = 0; i < COUNT * S; ++i) {
#pragma unroll
        for (int kh = i % S; kh < K; kh += S) {
#pragma unroll
          for (int kw = 0; kw < K; ++kw)
            sums[kh * K + kw] += grad[SEEN - 1 + i / S - kh / S] * x[i][kw];
        }
      }
#pragma unroll
      for (int i = 0; i < SEEN - 1; ++i) grad[i] = grad[COUNT + i];
      q += COUNT;
      bias.add(grads);
      grads = 0.0f;
    };
    const std::integral_constant<int, STEPS> steps;
    if constexpr (S > 1) {
      if (q * S + top < 0) advance(std::integral_constant<int, 1>(), std::true_type());
    }
    const int whole_end =
        S == 1 ? end : min(end, static_cast<int>(a.by_step.divide(a.in_h - top, &rest)));
    while (q + STEPS <= whole_end) advance(steps, std::false_type());
    while (q < end) advance(steps, std::true_type());
    bias.add(grads);  // where there was no step
  }

  add_up_warp(sums);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) bias.add(bias.from_lane(offset));
  __shared__ float warps[kThreads / 32][COUNT];
  __shared__ sum_t<T> warp_biases[kThreads / 32];
  constexpr int HELD = COUNT < 32 ? 1 : COUNT / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < HELD; ++i) warps[warp][lane * COUNT / 32 + i] = sums[i];
  if (lane == 0) warp_biases[warp] = bias;
  __syncthreads();
  if (threadIdx.x < TAPS) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) sum += warps[i][threadIdx.x];
    target.set(share, channel, threadIdx.x, sum);
  } else if (threadIdx.x == TAPS) {
    sum_t<T> sum;
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) sum.add(warp_biases[i]);
    target.set(share, channel, TAPS, sum.value());
  }
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, const Split& cut, cudaStream_t stream) {
  Arguments a{};
  a.grad_output = p.grad_output, a.input = p.input;
  a.channels = static_cast<int>(p.out_channels()), a.multiplier = static_cast<int>(p.multiplier);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.rows = static_cast<int>(cut.rows), a.share = static_cast<int>(cut.share);
  const int64_t strips = p.dilation_h * ceil_div(ceil_div(p.out_h, p.dilation_h), cut.rows);
  a.items = static_cast<int>(p.batch * strips * p.out_w);
  a.by_channels = Divisor(static_cast<uint32_t>(a.channels));
  a.by_out_w = Divisor(static_cast<uint32_t>(a.out_w));
  a.by_strips = Divisor(static_cast<uint32_t>(strips));
  a.by_dilation = Divisor(static_cast<uint32_t>(p.dilation_h));
  a.by_step = Divisor(static_cast<uint32_t>(Traits::kStride * p.dilation_h));
  const auto blocks = static_cast<unsigned>(cut.shares * p.out_channels());
  kernel<Traits><<<blocks, kThreads, 0, stream>>>(a, Sums<typename Traits::T>(p, cut.shares));
  return finish_launch(p, cut.shares, stream);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, const Split& cut, cudaStream_t stream) {
  const bool dilated = p.is_dilated();
#define DWSWAP_CASE(K, S, DILATED)                              \
  if (p.kernel_h == K && p.stride_h == S && dilated == DILATED) \
    return launch<Traits<T, K, S, DILATED>>(p, cut, stream);
  DWSWAP_CASE(3, 1, false)
  DWSWAP_CASE(3, 1, true)
  DWSWAP_CASE(3, 2, false)
  DWSWAP_CASE(5, 1, false)
  DWSWAP_CASE(5, 1, true)
  DWSWAP_CASE(5, 2, false)
  DWSWAP_CASE(7, 1, false)
  DWSWAP_CASE(7, 1, true)
  DWSWAP_CASE(7, 2, false)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const GradientParams&, const Split&, cudaStream_t)

}  // namespace plane_sums
}  // namespace dwswap
