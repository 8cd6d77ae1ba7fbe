// channels_last, the gradients of weight and bias, stride 1 (with any dilation) and 2, kernel sizes
// known at compile time, any number of channels and any alignment.
//
//   grad_weight[k] = sum over n and o of grad_output[o] input[stride o + dilation k - padding]
//
// With dilation, the pixels that are a multiple of it apart are images of their own, whose windows
// are dense: a walk has those of one phase.
//
// A thread owns neighbouring channels, an access wide, and walks down kColumns columns of
// grad_output at a time. It loads each row of input that they see once, and multiplies it by the
// kSeen rows of grad_output whose windows hold that row, which wait in registers: a step of the
// walk takes kStride rows of input and one of grad_output. The next kStages steps are on their way
// to shared memory, where each thread has places of its own: the compiler lets loads into registers
// share a counter, and waits for all of them. In the end the threads of a block that have the same
// channels add up their sums, in order.
#pragma once

#include "common/async_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/integer.h"
#include "common/sum.cuh"
#include "depthwise_conv2d/backward/channel_sums_cut.h"
#include "depthwise_conv2d/backward/sums.cuh"

namespace dwswap {
namespace channel_sums {

template <typename T_, int CHANNELS_, int K_, int STRIDE_>
struct Traits {
  using T = T_;
  static constexpr int kChannels = CHANNELS_;
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kColumns = columns_of(K_, STRIDE_);
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + K_;
  // Rows of grad_output that a row of input is seen from.
  static constexpr int kSeen = (K_ + STRIDE_ - 1) / STRIDE_;
  static constexpr int kMinBlocks = resident_blocks(K_, STRIDE_, CHANNELS_, sizeof(T_));
  static constexpr int kSums = K_ * K_ + 1;  // of a channel
  // Elements of half precision are rounded by more than a long sum in float32 is off. Those of
  // float32 are added up over so many rows, and these sums in turn.
  static constexpr bool kFolds = sizeof(T_) == 4;
  static constexpr int kFoldRows = 16;
  // So many of them meet in shared memory at once: 5 or 10 KiB.
  static constexpr int kChunk = 10;
  static constexpr int kChunkBytes = kChunk * kThreads * CHANNELS_ * 4;
  // Accesses of a step, and steps on their way: as many as fit 32 KiB, from 2 to 4.
  static constexpr int kWords = kStride * kInputColumns + kColumns;
  static constexpr int kStepBytes = kWords * kThreads * CHANNELS_ * static_cast<int>(sizeof(T));
  static constexpr int kFit = 32 * 1024 / kStepBytes;
  static constexpr int kStages = kFit < 2 ? 2 : kFit > 4 ? 4 : kFit;
  static constexpr int kSharedBytes =
      kStages * kStepBytes > kChunkBytes ? kStages * kStepBytes : kChunkBytes;
  static_assert(kSharedBytes <= 48 * 1024, "what a block gets without asking");
};

// A row of accesses of CHANNELS elements, `step` apart in memory and `place` in shared memory;
// zeros where nothing is wanted.
template <int CHANNELS, int PLACE, int COLUMNS, typename T>
__device__ __forceinline__ void fetch_row(T* target, const T* source, int step,
                                          const bool (&inside)[COLUMNS], bool wanted) {
  constexpr int kBytes = CHANNELS * static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    const bool read = wanted && inside[i];
    if constexpr (kBytes >= 4) {
      copy_async<kBytes>(target + i * PLACE, source + i * step, read ? kBytes : 0);
    } else {
      target[i * PLACE] = read ? source[i * step] : narrow<T>(0.0f);
    }
  }
}

struct Arguments {
  const void* grad_output;
  const void* input;
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w, dilation_h, dilation_w;
  int vectors, groups;  // threads of a block side by side, and with the same channels
  int rows;             // of grad_output, per column
  int items, share;     // strips of columns of all images, and those of a block
  Divisor by_slices, by_vectors, by_columns, by_strips, by_dilation_h, by_dilation_w;
  Divisor by_step;  // rows of input from a step to the next
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks)
    kernel(const Arguments a, const Sums<typename Traits::T> target) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kChannels;
  constexpr int COLUMNS = Traits::kColumns, IN_COLUMNS = Traits::kInputColumns;
  constexpr int SEEN = Traits::kSeen, STAGES = Traits::kStages, SUMS = Traits::kSums,
                CHUNK = Traits::kChunk;
  uint32_t slice, vector;
  const int share = static_cast<int>(a.by_slices.divide(blockIdx.x, &slice));
  const int group = static_cast<int>(a.by_vectors.divide(threadIdx.x, &vector));
  const int first_channel = static_cast<int>(slice) * a.vectors * V;
  const int c = first_channel + static_cast<int>(vector) * V;
  // With stride 2 there is none.
  const int dilation_h = S == 1 ? a.dilation_h : 1, dilation_w = S == 1 ? a.dilation_w : 1;
  const int in_row = a.in_w * a.channels * dilation_h;
  const int out_row = a.out_w * a.channels * dilation_h;
  const int pixel = a.channels * dilation_w;

  // Steps on their way, [stage][access][thread]; in the end, sums.
  __shared__ __align__(16) unsigned char storage[Traits::kSharedBytes];
  constexpr int PLACE = kThreads * V, STEP = Traits::kWords * PLACE;
  T* const own = reinterpret_cast<T*>(storage) + static_cast<int>(threadIdx.x) * V;
  T* const last = own + (STAGES - 1) * STEP;

  // Tap by tap, then the sum of grad_output.
  float sums[SUMS][V] = {}, totals[Traits::kFolds ? K * K : 1][V] = {};
  sum_t<T> bias[V];
  const auto fold = [&] {
    if constexpr (Traits::kFolds) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < K * K; ++i) totals[i][v] += sums[i][v], sums[i][v] = 0.0f;
        bias[v].add(sums[K * K][v]);
        sums[K * K][v] = 0.0f;
      }
    }
  };
  // Threads without channels stay for the barriers.
  const int end_item = c < a.channels ? min(a.items, (share + 1) * a.share) : 0;
  for (int item = share * a.share + group; item < end_item; item += a.groups) {
    uint32_t column, strip, phase_h = 0, phase_w = 0, rest;
    const uint32_t n = a.by_strips.divide(a.by_columns.divide(item, &column), &strip);
    int phase_rows = a.out_h;
    if constexpr (S == 1) {
      strip = a.by_dilation_h.divide(strip, &phase_h);
      column = a.by_dilation_w.divide(column, &phase_w);
      phase_rows =
          static_cast<int>(a.by_dilation_h.divide(a.out_h - 1 - phase_h + dilation_h, &rest));
    }
    // Row q of grad_output, of the phase, is row phase + q dilation. Step q takes it and the rows
    // of input from top + S q dilation on.
    const int first_row = static_cast<int>(strip) * a.rows;
    const int oh = first_row * dilation_h + static_cast<int>(phase_h);
    const int ow = static_cast<int>(column) * COLUMNS * dilation_w + static_cast<int>(phase_w);
    const int top = static_cast<int>(phase_h) - a.padding_h, iw = ow * S - a.padding_w;
    const int end_row = min(first_row + a.rows, phase_rows);
    const int end =
        min(end_row + SEEN - 1,
            static_cast<int>(a.by_step.divide(a.in_h - 1 - top + S * dilation_h, &rest)));
    const T* grad_source = static_cast<const T*>(a.grad_output) +
                           ((static_cast<int64_t>(n) * a.out_h + oh) * a.out_w + ow) * a.channels +
                           c;
    const T* source =
        static_cast<const T*>(a.input) +
        ((static_cast<int64_t>(n) * a.in_h + oh * S - a.padding_h) * a.in_w + iw) * a.channels + c;
    bool inside[IN_COLUMNS], grad_inside[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) grad_inside[i] = ow + i * dilation_w < a.out_w;
#pragma unroll
    for (int i = 0; i < IN_COLUMNS; ++i)
      inside[i] = static_cast<unsigned>(iw + i * dilation_w) < static_cast<unsigned>(a.in_w);

    T* place = own;
    // Step q, to `place`, which moves on.
    const auto fetch = [&](int q) {
      if (q < end) {
        fetch_row<V, PLACE>(place, grad_source, pixel, grad_inside, q < end_row);
#pragma unroll
        for (int e = 0; e < S; ++e) {
          const int ih = top + (q * S + e) * dilation_h;
          fetch_row<V, PLACE>(place + (COLUMNS + e * IN_COLUMNS) * PLACE, source + e * in_row,
                              pixel, inside,
                              static_cast<unsigned>(ih) < static_cast<unsigned>(a.in_h));
        }
      }
      commit_copies();
      grad_source += out_row, source += S * in_row;
      place = place == last ? own : place + STEP;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) fetch(first_row + i);

    float grad[SEEN][COLUMNS][V] = {};
#pragma unroll 1
    for (int q = first_row; q < end; ++q) {
      wait_for_groups<STAGES - 1>();
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
#pragma unroll
        for (int j = SEEN - 1; j > 0; --j) {
#pragma unroll
          for (int v = 0; v < V; ++v) grad[j][i][v] = grad[j - 1][i][v];
        }
        load(place + i * PLACE, grad[0][i]);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[K * K][v] += grad[0][i][v];
      }
      // The first steps may see the padding alone. Row e of a step is row e + S j of the windows of
      // the row of grad_output j steps ago.
      if (top + (q * S + S - 1) * dilation_h >= 0) {
#pragma unroll
        for (int e = 0; e < S; ++e) {
#pragma unroll
          for (int i = 0; i < IN_COLUMNS; ++i) {
            float x[V];
            load(place + (COLUMNS + e * IN_COLUMNS + i) * PLACE, x);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
              const int kw = i - column * S;
              if (kw < 0 || kw >= K) continue;
#pragma unroll
              for (int j = 0; j < SEEN; ++j) {
                const int kh = e + S * j;
                if (kh >= K) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) sums[kh * K + kw][v] += x[v] * grad[j][column][v];
              }
            }
          }
        }
      }
      fetch(q + STAGES);
      if (Traits::kFolds && (q - first_row) % Traits::kFoldRows == Traits::kFoldRows - 1) fold();
    }
    fold();
  }

  release_next_kernel();
  // [sum][group][channel]
  wait_for_copies();
  __syncthreads();
  auto* shared = reinterpret_cast<float*>(storage);
  const int width = a.vectors * V;
  const int used = min(width, a.channels - first_channel);
#pragma unroll
  for (int begin = 0; begin < SUMS; begin += CHUNK) {
    if (begin != 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      if (begin + i >= SUMS) continue;
#pragma unroll
      for (int v = 0; v < V; ++v)
        shared[(i * a.groups + group) * width + static_cast<int>(vector) * V + v] =
            !Traits::kFolds      ? sums[begin + i][v]
            : begin + i == K * K ? bias[v].value()
                                 : totals[begin + i][v];
    }
    __syncthreads();
    for (int i = 0; i < min(CHUNK, SUMS - begin); ++i) {
      for (int own = threadIdx.x; own < used; own += blockDim.x) {
        sum_t<T> sum;
        for (int g = 0; g < a.groups; ++g) sum.add(shared[(i * a.groups + g) * width + own]);
        target.set(share, first_channel + own, begin + i, sum.value());
      }
    }
  }
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, const Cut& cut, cudaStream_t stream) {
  const int64_t strips = p.dilation_h * ceil_div(ceil_div(p.out_h, p.dilation_h), cut.split.rows);
  const int64_t columns =
      p.dilation_w * ceil_div(ceil_div(p.out_w, p.dilation_w), Traits::kColumns);
  Arguments a{};
  a.grad_output = p.grad_output, a.input = p.input;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.vectors = cut.vectors, a.groups = cut.groups;
  a.rows = static_cast<int>(cut.split.rows), a.share = static_cast<int>(cut.split.share);
  a.items = static_cast<int>(p.batch * strips * columns);
  a.by_slices = Divisor(static_cast<uint32_t>(cut.slices));
  a.by_vectors = Divisor(static_cast<uint32_t>(cut.vectors));
  a.by_columns = Divisor(static_cast<uint32_t>(columns));
  a.by_strips = Divisor(static_cast<uint32_t>(strips));
  a.by_dilation_h = Divisor(static_cast<uint32_t>(p.dilation_h));
  a.by_dilation_w = Divisor(static_cast<uint32_t>(p.dilation_w));
  a.by_step = Divisor(static_cast<uint32_t>(Traits::kStride * p.dilation_h));
  const auto blocks = static_cast<unsigned>(cut.split.shares * cut.slices);
  const auto threads = static_cast<unsigned>(cut.vectors * cut.groups);
  kernel<Traits><<<blocks, threads, 0, stream>>>(a, Sums<typename Traits::T>(p, cut.split.shares));
  return finish_launch(p, cut.split.shares, stream);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, const Cut& cut, cudaStream_t stream) {
#define DWSWAP_CASE(K, S)                                                              \
  if (p.kernel_h == K && p.stride_h == S) {                                            \
    return cut.channels == 1                                                           \
               ? launch<Traits<T, 1, K, S>>(p, cut, stream)                            \
               : launch<Traits<T, most_channels(K, sizeof(T)), K, S>>(p, cut, stream); \
  }
  DWSWAP_CASE(3, 1)
  DWSWAP_CASE(3, 2)
  DWSWAP_CASE(5, 1)
  DWSWAP_CASE(5, 2)
  DWSWAP_CASE(7, 1)
  DWSWAP_CASE(7, 2)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const GradientParams&, const Cut&, cudaStream_t)

}  // namespace channel_sums
}  // namespace dwswap
