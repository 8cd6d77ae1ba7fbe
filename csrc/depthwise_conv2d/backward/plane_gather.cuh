// NCHW, the gradient of the input of stride 2, kernel sizes known at compile time.
//
//   grad_input[y] = sum over the taps k = y + padding (mod 2) of
//                   grad_output[(y + padding - k) / 2] weight[k]
// along both axes. A thread owns a column of the gradient and kPairs pairs of rows, of which the
// first sees the even rows of taps and the second the odd ones; both see the same rows of
// grad_output. Its column sees every other column of taps. It loads all that it needs before it
// uses the first, and so waits for memory once. Neighbouring threads store neighbouring columns.
#pragma once

#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/backward/gather.h"

namespace dwswap {
namespace plane_gather {

constexpr int kThreads = 128;

template <typename T_, int K_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = K_;
  // Rows and columns of grad_output that a pixel sees at most.
  static constexpr int kSeen = (K_ + 1) / 2;
  static constexpr int kMinBlocks = K_ == 7 ? 4 : 8;
};

struct Arguments {
  const void* grad_output;
  const void* weight;
  void* grad_input;
  int in_h, in_w, out_h, out_w, padding_h, padding_w;
  uint32_t threads;
  Divisor by_in_w, by_strips, by_channels;
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, SEEN = Traits::kSeen, ROWS = kPairs + SEEN - 1;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.threads) return;
  uint32_t iw, strip, c;
  const uint32_t plane = a.by_strips.divide(a.by_in_w.divide(index, &iw), &strip);
  a.by_channels.divide(plane, &c);
  const int x = static_cast<int>(iw) + a.padding_w;
  const int odd = x & 1, ow = x >> 1;
  const int first = (a.padding_h >> 1) + static_cast<int>(strip) * kPairs;  // pair of rows

  // Loads come as they are in memory: written as C++, what is loaded where a predicate says so
  // would be converted there, and waited for.
  using Element = Words<T, 1>;
  bool inside[SEEN];
  Element raw_taps[K][SEEN] = {}, raw[ROWS][SEEN] = {};
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * K * K + odd;
#pragma unroll
  for (int j = 0; j < SEEN; ++j) {
    // Odd columns see one column of taps less.
    const bool exists = 2 * j + 1 < K || odd == 0;
    inside[j] = exists && static_cast<unsigned>(ow - j) < static_cast<unsigned>(a.out_w);
#pragma unroll
    for (int kh = 0; kh < K; ++kh) load_where(exists, weight + kh * K + 2 * j, raw_taps[kh][j]);
  }
  const T* source =
      static_cast<const T*>(a.grad_output) + static_cast<int64_t>(plane) * a.out_h * a.out_w + ow;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int oh = first - (SEEN - 1) + i;
    const bool row_inside = static_cast<unsigned>(oh) < static_cast<unsigned>(a.out_h);
#pragma unroll
    for (int j = 0; j < SEEN; ++j)
      load_where(row_inside && inside[j], source + oh * a.out_w - j, raw[i][j]);
  }
  float taps[K][SEEN], grad[ROWS][SEEN];
#pragma unroll
  for (int j = 0; j < SEEN; ++j) {
#pragma unroll
    for (int kh = 0; kh < K; ++kh) taps[kh][j] = widen(raw_taps[kh][j]);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) grad[i][j] = widen(raw[i][j]);
  }

  T* target = static_cast<T*>(a.grad_input) + static_cast<int64_t>(plane) * a.in_h * a.in_w + iw;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    float sums[2] = {};
#pragma unroll
    for (int kh = 0; kh < K; ++kh) {
#pragma unroll
      for (int j = 0; j < SEEN; ++j)
        sums[kh % 2] += grad[pair + SEEN - 1 - kh / 2][j] * taps[kh][j];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int ih = 2 * (first + pair) + r - a.padding_h;
      if (static_cast<unsigned>(ih) < static_cast<unsigned>(a.in_h))
        target[ih * a.in_w] = narrow<T>(sums[r]);
    }
  }
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, cudaStream_t stream) {
  const auto strips = static_cast<uint32_t>(ceil_div(pairs_of(p.in_h, p.padding_h), kPairs));
  Arguments a{};
  a.grad_output = p.grad_output, a.weight = p.weight, a.grad_input = p.grad_input;
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.threads = static_cast<uint32_t>(p.batch * p.channels * strips * p.in_w);
  a.by_in_w = Divisor(static_cast<uint32_t>(p.in_w)), a.by_strips = Divisor(strips);
  a.by_channels = Divisor(static_cast<uint32_t>(p.channels));
  const auto blocks = static_cast<unsigned>(ceil_div(a.threads, kThreads));
  kernel<Traits><<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, cudaStream_t stream) {
#define DWSWAP_CASE(K) \
  if (p.kernel_h == K) return launch<Traits<T, K>>(p, stream);
  DWSWAP_CASE(3)
  DWSWAP_CASE(5)
  DWSWAP_CASE(7)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

}  // namespace plane_gather
}  // namespace dwswap
