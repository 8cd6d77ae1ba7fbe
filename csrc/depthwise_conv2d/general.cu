// The kernel that is right for everything: any kernel size, stride, dilation, multiplier, strides
// and size of tensors. One thread computes kRows rows of one output column of one channel.
#include <limits>

#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    general_kernel(const DepthwiseConv2dParams p, const Index threads) {
  using A = accumulator_t<T>;
  const Index strips = static_cast<Index>((p.out_h + kRows - 1) / kRows);
  const Index out_channels = static_cast<Index>(p.channels * p.multiplier);
  const Index out_w = static_cast<Index>(p.out_w);
  const Index in_h = static_cast<Index>(p.in_h), in_w = static_cast<Index>(p.in_w);
  const Index kernel_h = static_cast<Index>(p.kernel_h), kernel_w = static_cast<Index>(p.kernel_w);
  const Index stride_h = static_cast<Index>(p.stride_h), stride_w = static_cast<Index>(p.stride_w);
  const Index padding_h = static_cast<Index>(p.padding_h);
  const Index padding_w = static_cast<Index>(p.padding_w);
  const Index dilation_h = static_cast<Index>(p.dilation_h);
  const Index dilation_w = static_cast<Index>(p.dilation_w);
  const Index in_stride_h = static_cast<Index>(p.in_stride.h);
  const Index in_stride_w = static_cast<Index>(p.in_stride.w);
  const auto* input = static_cast<const T*>(p.input);
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias);
  const auto* input_bias = static_cast<const T*>(p.input_bias);
  auto* output = static_cast<T*>(p.output);

  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < threads; i += step) {
    // The fastest index of the output comes first, so that a warp stores neighbours.
    Index rest = i, k, ow;
    if (p.out_layout == Layout::kChannelsLast) {
      k = rest % out_channels, rest /= out_channels;
      ow = rest % out_w, rest /= out_w;
    } else {
      ow = rest % out_w, rest /= out_w;
    }
    const Index strip = rest % strips;
    rest /= strips;
    if (p.out_layout != Layout::kChannelsLast) k = rest % out_channels, rest /= out_channels;
    const Index n = rest;
    const Index c = k / static_cast<Index>(p.multiplier);
    const Index oh = strip * kRows;

    A sums[kRows] = {};
    const A shift = input_bias == nullptr ? A(0) : widen(input_bias[c]);
    const T* plane =
        input + static_cast<int64_t>(n) * p.in_stride.n + static_cast<int64_t>(c) * p.in_stride.c;
    const T* taps = weight + static_cast<int64_t>(k) * kernel_h * kernel_w;
    const Index ih0 = oh * stride_h - padding_h;
    const Index iw0 = ow * stride_w - padding_w;
    for (Index kh = 0; kh < kernel_h; ++kh) {
      for (Index kw = 0; kw < kernel_w; ++kw) {
        const A tap = widen(taps[kh * kernel_w + kw]);
        const Index iw = iw0 + kw * dilation_w;
        if (iw < 0 || iw >= in_w) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Index ih = ih0 + r * stride_h + kh * dilation_h;
          if (ih < 0 || ih >= in_h) continue;
          A x[1] = {widen(plane[ih * in_stride_h + iw * in_stride_w]) + shift};
          activate(x, p.input_activation);
          sums[r] += x[0] * tap;
        }
      }
    }
    const A offset = bias == nullptr ? A(0) : widen(bias[k]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] += offset;
    activate(sums, p.activation);
    T* target = output + static_cast<int64_t>(n) * p.out_stride.n +
                static_cast<int64_t>(k) * p.out_stride.c +
                static_cast<int64_t>(ow) * p.out_stride.w;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (static_cast<int64_t>(oh) + r < p.out_h) {
        target[(static_cast<int64_t>(oh) + r) * p.out_stride.h] = narrow<T>(sums[r]);
      }
    }
  }
}

template <typename T>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const int64_t strips = ceil_div(p.out_h, kRows);
  const int64_t threads = p.batch * p.out_channels() * strips * p.out_w;
  const int64_t blocks = ceil_div(threads, kThreads);
  // Enough for any GPU; the rest of the work is in the loop.
  const auto grid = static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
  // 32-bit indices must hold: the thread index one step of the grid past the end, offsets within
  // a plane, and coordinates up to kRows - 1 rows past the padded image, and taps.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - (int64_t{1} << 28);
  static_assert((int64_t{1} << 28) >= (int64_t{1} << 20) * kThreads, "a step of the grid fits");
  const int64_t plane = (p.in_h - 1) * p.in_stride.h + (p.in_w - 1) * p.in_stride.w;
  const int64_t padded_h = p.in_h + 2 * p.padding_h + kRows * p.stride_h;
  const int64_t padded_w = p.in_w + 2 * p.padding_w + p.stride_w;
  if (threads <= kLimit && plane <= kLimit && padded_h <= kLimit && padded_w <= kLimit &&
      p.kernel_h * p.kernel_w <= kLimit) {
    general_kernel<T, int32_t><<<grid, kThreads, 0, stream>>>(p, static_cast<int32_t>(threads));
  } else {
    general_kernel<T, int64_t><<<grid, kThreads, 0, stream>>>(p, threads);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_general(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  return visit_type(params.dtype, [&]<typename T>() { return launch<T>(params, stream); });
}

}  // namespace dwswap
