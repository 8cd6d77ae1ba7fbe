// The gradient of the input, right for everything: any kernel size, stride, dilation, padding and
// multiplier. One thread gathers one element:
//   grad_input[y] = sum over k and o with stride o + dilation k = y + padding of
//                   grad_output[o] weight[k].
#include <limits>

#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/backward/params.h"

namespace dwswap {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    general_gather_kernel(const GradientParams p, const Index threads) {
  using A = accumulator_t<T>;
  const Index channels = static_cast<Index>(p.channels);
  const Index multiplier = static_cast<Index>(p.multiplier);
  const Index in_h = static_cast<Index>(p.in_h), in_w = static_cast<Index>(p.in_w);
  const Index out_h = static_cast<Index>(p.out_h), out_w = static_cast<Index>(p.out_w);
  const Index kernel_h = static_cast<Index>(p.kernel_h), kernel_w = static_cast<Index>(p.kernel_w);
  const Index stride_h = static_cast<Index>(p.stride_h), stride_w = static_cast<Index>(p.stride_w);
  const Index dilation_h = static_cast<Index>(p.dilation_h);
  const Index dilation_w = static_cast<Index>(p.dilation_w);
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < threads; i += step) {
    // The fastest index of the image comes first, so that a warp stores neighbours.
    Index rest = i, c, iw, ih;
    if (p.in_layout == Layout::kChannelsLast) {
      c = rest % channels, rest /= channels;
      iw = rest % in_w, rest /= in_w;
      ih = rest % in_h, rest /= in_h;
    } else {
      iw = rest % in_w, rest /= in_w;
      ih = rest % in_h, rest /= in_h;
      c = rest % channels, rest /= channels;
    }
    const T* image = static_cast<const T*>(p.grad_output) +
                     static_cast<int64_t>(rest) * p.out_stride.n +
                     static_cast<int64_t>(c) * multiplier * p.out_stride.c;
    const T* taps = static_cast<const T*>(p.weight) +
                    static_cast<int64_t>(c) * multiplier * kernel_h * kernel_w;
    A sum = 0;
    for (Index kh = 0; kh < kernel_h; ++kh) {
      const Index y = ih + static_cast<Index>(p.padding_h) - kh * dilation_h;
      if (y < 0) break;
      const Index oh = y / stride_h;
      if (oh * stride_h != y || oh >= out_h) continue;
      for (Index kw = 0; kw < kernel_w; ++kw) {
        const Index x = iw + static_cast<Index>(p.padding_w) - kw * dilation_w;
        if (x < 0) break;
        const Index ow = x / stride_w;
        if (ow * stride_w != x || ow >= out_w) continue;
        const T* grad = image + static_cast<int64_t>(oh) * p.out_stride.h +
                        static_cast<int64_t>(ow) * p.out_stride.w;
        const T* tap = taps + kh * kernel_w + kw;
        // As a rule there is one.
#pragma unroll 1
        for (Index m = 0; m < multiplier; ++m) {
          sum += widen(grad[m * p.out_stride.c]) *
                 widen(tap[static_cast<int64_t>(m) * kernel_h * kernel_w]);
        }
      }
    }
    static_cast<T*>(p.grad_input)[i] = narrow<T>(sum);
  }
}

template <typename T>
cudaError_t launch(const GradientParams& p, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 1 << 20;
  const int64_t threads = p.batch * p.channels * p.in_h * p.in_w;
  const int64_t blocks = ceil_div(threads, kThreads);
  const auto grid = static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
  // 32-bit indices must hold: the thread index one step of the grid past the end, coordinates of
  // the padded image, and taps.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - kMostBlocks * kThreads;
  if (threads <= kLimit && p.in_h + 2 * p.padding_h <= kLimit &&
      p.in_w + 2 * p.padding_w <= kLimit && p.stride_h <= kLimit && p.stride_w <= kLimit &&
      p.dilation_h <= kLimit && p.dilation_w <= kLimit && p.taps() <= kLimit &&
      p.out_channels() <= kLimit) {
    general_gather_kernel<T, int32_t>
        <<<grid, kThreads, 0, stream>>>(p, static_cast<int32_t>(threads));
  } else {
    general_gather_kernel<T, int64_t><<<grid, kThreads, 0, stream>>>(p, threads);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_general_gather(const GradientParams& p, cudaStream_t stream) {
  return visit_type(p.dtype, [&]<typename T>() { return launch<T>(p, stream); });
}

}  // namespace dwswap
