// Layer normalization over the channels of every pixel, a row:
//   y[r, c] = (x[r, c] - mean) / sqrt(variance + eps) * weight[c] + bias[c]
// mean and variance are those of row r, whose C values stay in registers: a row is read once.
//
//   m = sum of x / C,  d = x - m,  rest = sum of d / C
//   mean = m + rest,   variance = sum of d^2 / C - rest^2
//
// m is the mean but for its rounding, which next to small deviations from a large mean is not
// small; rest corrects it (Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
// 1983). Values are divided before they are summed, so that means are finite where they are.
//
// It moves each byte once, so loads in flight are what it needs: bandwidth times latency is about
// 22 KiB for a multiprocessor (interleave_channels/kernel.cu). Half of what moves is read, and
// 512 threads with vectors of 64 bytes at least have 32 KiB under way. What is left to save are
// instructions: at 4.8 TB/s a multiprocessor has 3 cycles to issue those of 64 bytes.
#include <limits>

#include "channel_norm/params.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/sum.cuh"

namespace dwswap {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
// Registers of a thread for values of one row, and of two.
constexpr int kMostValues = 64, kSideBySide = 48;
constexpr int kMostChannels = kMostValues * kWarp;

// A row is shared by a group of L lanes of a warp, which have vectors `lane`, L + lane, ... of it,
// V at most.
template <typename T, int L, int V>
struct RowTile {
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kGroups = kThreads / L;
  static_assert(L <= kWarp && kThreads % L == 0, "groups of lanes of one warp");
  static_assert(V * kVector <= kMostValues, "half precision: V <= 8, float32: V <= 16");
  // Rows of a thread, side by side: their loads and sums overlap, and weights are read once.
  static constexpr int kRows = 2 * V * kVector <= kSideBySide ? 2 : 1;
  // Of a multiprocessor: 65536 / (4 x 128) = 128 registers for a thread, or 168 where its loads,
  // and those of weights, are 256 bytes each.
  static constexpr int kBlocks = V * kVectorBytes < 256 ? 4 : 3;
};

// Weights and biases are not written while the kernel runs, so their loads may pass its stores.
template <typename T, int N>
__device__ __forceinline__ void load_parameters(const void* source, int at, float otherwise,
                                                float (&target)[N]) {
  if (source == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = otherwise;
    return;
  }
  static_assert(Words<T, N>::kBytes == kVectorBytes, "one access");
  const uint4 word = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(source) + at));
  widen_all(Words<T, N>{word.x, word.y, word.z, word.w}, target);
}

template <int L, int N>
__device__ __forceinline__ void sum_over_group(float (&sums)[N]) {
#pragma unroll
  for (int offset = L / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += shuffled(sums[i], offset);
  }
}

// kSure: vectors that every lane has. No lane returns before the last shuffle.
template <typename T, int L, int kSure, int V>
__global__ void __launch_bounds__(kThreads, RowTile<T, L, V>::kBlocks)
    channel_norm_kernel(const ChannelNormParams p) {
  using Tile = RowTile<T, L, V>;
  constexpr int kRows = Tile::kRows, kVector = Tile::kVector, kGroups = Tile::kGroups;
  const auto channels = static_cast<int>(p.channels);
  const int first_channel = static_cast<int>(threadIdx.x) % L * kVector;
  const int64_t first_row =
      int64_t{blockIdx.x} * (kGroups * kRows) + static_cast<int>(threadIdx.x) / L;
  const auto has = [&](int v) { return v < kSure || first_channel + v * (L * kVector) < channels; };
  // Behind the last row it is the last one again, which is not written.
  const auto place = [&](int r) {
    const int64_t row = first_row + r * kGroups;
    return (row < p.rows ? row : p.rows - 1) * channels + first_channel;
  };

  Words<T, kVector> words[kRows][V];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T* const source = static_cast<const T*>(p.input) + place(r);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (has(v)) {
        words[r][v] = load_words<kVector>(source + v * (L * kVector));
      } else {
        words[r][v] = {};
      }
    }
  }
  const float share = 1.0f / static_cast<float>(channels);
  float x[kRows][V][kVector], means[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      widen_all(words[r][v], x[r][v]);  // zeros where there is no vector
#pragma unroll
      for (int i = 0; i < kVector; i += 2)
        even += x[r][v][i] * share, odd += x[r][v][i + 1] * share;
    }
    means[r] = even + odd;
  }
  sum_over_group<L>(means);

  float sums[2 * kRows];  // of deviations / C, of their squares
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!has(v)) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float deviation = x[r][v][i] -= means[r];
        sum += deviation * share, squares += deviation * deviation;
      }
    }
    sums[2 * r] = sum, sums[2 * r + 1] = squares;
  }
  sum_over_group<L>(sums);
  float scales[kRows], shifts[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float rest = sums[2 * r];
    // In one step, so that an infinite variance minus what would be is not NaN.
    const float variance = maximum(fmaf(-rest, rest, sums[2 * r + 1] * share), 0.0f);
    scales[r] = rsqrtf(variance + p.eps);
    shifts[r] = -rest * scales[r];
  }

#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!has(v)) continue;
    float weight[kVector], bias[kVector];
    load_parameters<T>(p.weight, first_channel + v * (L * kVector), 1.0f, weight);
    load_parameters<T>(p.bias, first_channel + v * (L * kVector), 0.0f, bias);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        y[i] = fmaf(fmaf(x[r][v][i], scales[r], shifts[r]), weight[i], bias[i]);
      if (first_row + r * kGroups < p.rows)
        store(static_cast<T*>(p.output) + place(r) + v * (L * kVector), y);
    }
  }
}

// Rows of any length at any place: a warp has a row, and finds it in its cache again.
template <typename T>
__global__ void __launch_bounds__(kThreads) channel_norm_scalar_kernel(const ChannelNormParams p) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.rows) return;  // all lanes of the warp
  const auto channels = static_cast<int>(p.channels);
  const int lane = threadIdx.x % kWarp;
  const T* const x = static_cast<const T*>(p.input) + row * channels;
  T* const y = static_cast<T*>(p.output) + row * channels;
  const auto row_sum = [&](auto&& value) {
    PlainSum<float> sum;
    for (int c = lane; c < channels; c += kWarp) sum.add(value(widen(x[c])));
    return sum_over_lanes(sum, kWarp);
  };
  const float share = 1.0f / static_cast<float>(channels);
  const float mean = row_sum([&](float value) { return value * share; });
  const float rest = row_sum([&](float value) { return (value - mean) * share; });
  const auto deviation = [&](float value) { return value - mean - rest; };
  const float squares = row_sum([&](float value) { return deviation(value) * deviation(value); });
  const float scale = rsqrtf(squares * share + p.eps);
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  for (int c = lane; c < channels; c += kWarp) {
    const float factor = weight == nullptr ? 1.0f : widen(__ldg(weight + c));
    const float added = bias == nullptr ? 0.0f : widen(__ldg(bias + c));
    y[c] = narrow<T>(deviation(widen(x[c])) * scale * factor + added);
  }
}

template <typename T, int L, int kSure, int V>
cudaError_t launch(const ChannelNormParams& p, cudaStream_t stream) {
  using Tile = RowTile<T, L, V>;
  const auto blocks = static_cast<unsigned>(ceil_div(p.rows, Tile::kGroups * Tile::kRows));
  channel_norm_kernel<T, L, kSure, V><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// With the first of V, Larger... that is enough for the `vectors` of a row, which are more than
// kSure for each of L lanes.
template <typename T, int L, int kSure, int V, int... Larger>
cudaError_t launch_enough(const ChannelNormParams& p, int vectors, cudaStream_t stream) {
  if (vectors <= L * V) return launch<T, L, kSure, V>(p, stream);
  if constexpr (sizeof...(Larger) > 0) {
    return launch_enough<T, L, V, Larger...>(p, vectors, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

// The fewest lanes, for the fewest shuffles, that have 4 vectors at most; 4 of them read 64 bytes
// side by side. So there are more than 2 for each where lanes are more than 4.
template <typename T>
cudaError_t launch_vectors(const ChannelNormParams& p, int vectors, cudaStream_t stream) {
  if (vectors <= 4 * 4) return launch_enough<T, 4, 0, 3, 4>(p, vectors, stream);
  if (vectors <= 4 * 8) return launch_enough<T, 8, 2, 3, 4>(p, vectors, stream);
  if (vectors <= 4 * 16) return launch_enough<T, 16, 2, 3, 4>(p, vectors, stream);
  if constexpr (sizeof(T) == 2) {
    return launch_enough<T, 32, 2, 3, 4, 6, 8>(p, vectors, stream);
  } else {
    return launch_enough<T, 32, 2, 3, 4, 6, 8, 12, 16>(p, vectors, stream);
  }
}

}  // namespace

bool covers_channel_norm(const ChannelNormParams& p) {
  constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
  return p.dtype != DataType::kFloat64 && p.channels > 0 && p.channels <= kMostChannels &&
         p.rows <= kMostBlocks * (kThreads / kWarp);
}

cudaError_t launch_channel_norm(const ChannelNormParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype, [&]<typename T>() {
    constexpr int64_t kVector = kVectorBytes / sizeof(T);
    const auto places = reinterpret_cast<uintptr_t>(p.input) |
                        reinterpret_cast<uintptr_t>(p.weight) |
                        reinterpret_cast<uintptr_t>(p.bias) | reinterpret_cast<uintptr_t>(p.output);
    if (places % kVectorBytes != 0 || p.channels % kVector != 0) {
      const auto blocks = static_cast<unsigned>(ceil_div(p.rows, kThreads / kWarp));
      channel_norm_scalar_kernel<T><<<blocks, kThreads, 0, stream>>>(p);
      return cudaGetLastError();
    }
    return launch_vectors<T>(p, static_cast<int>(p.channels / kVector), stream);
  });
}

}  // namespace dwswap
