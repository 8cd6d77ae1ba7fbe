// channels_last, the gradient of the input of stride 2, kernel sizes known at compile time.
//
//   grad_input[y] = sum over the taps k = y + padding (mod 2) of
//                   grad_output[(y + padding - k) / 2] weight[k]
// along both axes. A thread owns neighbouring channels, an access wide, of kRowPairs x kColumnPairs
// squares of 2 x 2 pixels. The pixels of a square see the same pixels of grad_output, and have K *
// K multiply-adds together. Lanes run over the channels first, so that the accesses of a warp
// follow each other in memory. A thread loads all that it needs before it uses the first, and so
// waits for memory once.
#pragma once

#include "common/alignment.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/backward/gather.h"
#include "depthwise_conv2d/channel_pairs.cuh"

namespace dwswap {
namespace channel_gather {

constexpr int kThreads = 128;

template <typename T_, int CHANNELS_, int K_>
struct Traits {
  using T = T_;
  static constexpr int kChannels = CHANNELS_;
  static constexpr int kKernel = K_;
  // Rows and columns of grad_output that a square sees.
  static constexpr int kSeen = (K_ + 1) / 2;
  // Taps, and what is loaded, share the registers.
  static constexpr int kRowPairs = K_ == 3 ? 4 : 2;
  static constexpr int kColumnPairs = K_ == 7 ? 1 : 2;
  static constexpr int kMinBlocks = K_ == 3 ? 6 : K_ == 5 ? 4 : 3;
};

struct Arguments {
  const void* grad_output;
  const void* weight;
  void* grad_input;
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  uint32_t threads;
  Divisor by_vectors, by_groups, by_strips;
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, V = Traits::kChannels, SEEN = Traits::kSeen;
  constexpr int ROWS = Traits::kRowPairs + SEEN - 1, COLUMNS = Traits::kColumnPairs + SEEN - 1;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.threads) return;
  uint32_t vector, group, strip;
  const uint32_t n =
      a.by_strips.divide(a.by_groups.divide(a.by_vectors.divide(index, &vector), &group), &strip);
  const int c = static_cast<int>(vector) * V;
  // The first square, in pairs.
  const int row = (a.padding_h >> 1) + static_cast<int>(strip) * Traits::kRowPairs;
  const int column = (a.padding_w >> 1) + static_cast<int>(group) * Traits::kColumnPairs;

  const int first_h = row - (SEEN - 1), first_w = column - (SEEN - 1);
  const T* source = static_cast<const T*>(a.grad_output) +
                    (static_cast<int64_t>(n) * a.out_h + first_h) * a.out_w * a.channels +
                    static_cast<int64_t>(first_w) * a.channels + c;
  Words<T, V> words[ROWS][COLUMNS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i, source += a.out_w * a.channels) {
    const bool row_inside = static_cast<unsigned>(first_h + i) < static_cast<unsigned>(a.out_h);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const bool inside =
          row_inside && static_cast<unsigned>(first_w + j) < static_cast<unsigned>(a.out_w);
      words[i][j] = inside ? load_words<V>(source + j * a.channels) : Words<T, V>{};
    }
  }
  float taps[V][K * K];
  load_taps(static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * (K * K), taps);

  const int ih = 2 * row - a.padding_h, iw = 2 * column - a.padding_w;
  T* target = static_cast<T*>(a.grad_input) +
              (static_cast<int64_t>(n) * a.in_h + ih) * a.in_w * a.channels +
              static_cast<int64_t>(iw) * a.channels + c;
#pragma unroll
  for (int y = 0; y < 2 * Traits::kRowPairs; ++y, target += a.in_w * a.channels) {
    const bool row_inside = static_cast<unsigned>(ih + y) < static_cast<unsigned>(a.in_h);
    float sums[2 * Traits::kColumnPairs][V] = {};
#pragma unroll
    for (int kh = y % 2; kh < K; kh += 2) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        float grad[V];
        widen_all(words[y / 2 + SEEN - 1 - kh / 2][j], grad);
#pragma unroll
        for (int x = 0; x < 2 * Traits::kColumnPairs; ++x) {
          const int kw = x % 2 + 2 * (x / 2 + SEEN - 1 - j);
          if (x / 2 + SEEN - 1 < j || kw >= K) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sums[x][v] += grad[v] * taps[v][kh * K + kw];
        }
      }
    }
#pragma unroll
    for (int x = 0; x < 2 * Traits::kColumnPairs; ++x) {
      const bool inside =
          row_inside && static_cast<unsigned>(iw + x) < static_cast<unsigned>(a.in_w);
      if (inside) store(target + x * a.channels, sums[x]);
    }
  }
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, cudaStream_t stream) {
  const auto vectors = static_cast<uint32_t>(p.channels / Traits::kChannels);
  const auto groups =
      static_cast<uint32_t>(ceil_div(pairs_of(p.in_w, p.padding_w), Traits::kColumnPairs));
  const auto strips =
      static_cast<uint32_t>(ceil_div(pairs_of(p.in_h, p.padding_h), Traits::kRowPairs));
  Arguments a{};
  a.grad_output = p.grad_output, a.weight = p.weight, a.grad_input = p.grad_input;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.threads = static_cast<uint32_t>(p.batch * vectors * groups * strips);
  a.by_vectors = Divisor(vectors), a.by_groups = Divisor(groups), a.by_strips = Divisor(strips);
  const auto blocks = static_cast<unsigned>(ceil_div(a.threads, kThreads));
  kernel<Traits><<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, cudaStream_t stream) {
  const bool pairs =
      aligned_to(2 * sizeof(T), p.channels * sizeof(T), {p.grad_output, p.weight, p.grad_input});
#define DWSWAP_CASE(K) \
  if (p.kernel_h == K) \
    return pairs ? launch<Traits<T, 2, K>>(p, stream) : launch<Traits<T, 1, K>>(p, stream);
  DWSWAP_CASE(3)
  DWSWAP_CASE(5)
  DWSWAP_CASE(7)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

}  // namespace channel_gather
}  // namespace dwswap
