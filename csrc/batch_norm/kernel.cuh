// Batch normalization in training and the activation behind it, for images in either layout.
//
// Forward: sums of parts of the batch (sum_kernel), statistics of each channel of these
// (statistics_kernel), then y = activation((x - mean) * scale + bias) (normalize_kernel). Backward,
// with dz the gradient of z, which is that of y times the activation's derivative:
//
//   d bias = sum of dz,  d weight = sum of dz * (x - mean) / deviation
//   dx = scale * (dz - d bias / M - (x - mean) / deviation * d weight / M)
//
// over M values of a channel (Ioffe and Szegedy, "Batch Normalization", 2015, section 3), again in
// three steps. z is computed anew from x, so nothing between the two layers is ever kept.
//
// The sums of x and of x^2 are those of x - K, K the mean of a few values of the channel, which is
// nearer to the channel's than its deviation, so that no digits cancel (Chan, Golub and LeVeque,
// "Algorithms for computing the sample variance", 1983). Every sum has one order, so results are
// the same bit for bit each time.
//
// It moves bytes: what the first step has read last lies in L2, so the last step begins with it.
#pragma once

#include "batch_norm/launch.h"
#include "batch_norm/share.cuh"
#include "common/activation.cuh"
#include "common/dependent_launch.cuh"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/sum.cuh"

namespace dwswap {
namespace batch_norm {

// gradient *= activation'(z), as aten has the derivatives.
template <typename T, int N>
__device__ __forceinline__ void multiply_by_derivative(float (&gradient)[N], const float (&z)[N],
                                                       Activation activation) {
  switch (activation) {
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) gradient[i] = z[i] <= 0.0f ? 0.0f : gradient[i];
      return;
    case Activation::kRelu6:
#pragma unroll
      for (int i = 0; i < N; ++i) gradient[i] = z[i] <= 0.0f || z[i] >= 6.0f ? 0.0f : gradient[i];
      return;
    case Activation::kHardswish:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float slope = z[i] < 3.0f ? fmaf(z[i], 1.0f / 3.0f, 0.5f) : 1.0f;
        gradient[i] = z[i] <= -3.0f ? 0.0f : gradient[i] * slope;
      }
      return;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // Sums of many of the fast form would show its errors in float32.
        const float gate = sizeof(T) == 4 ? 1.0f / (1.0f + expf(-z[i])) : sigmoid_of(z[i]);
        gradient[i] *= gate * fmaf(z[i], 1.0f - gate, 1.0f);
      }
      return;
    default:
      return;
  }
}

// Of the channels of a thread.
template <typename T, int V, bool MATRIX>
struct Statistics {
  static constexpr int kColumns = Share<T, V, MATRIX>::kColumns;
  float mean[kColumns], scale[kColumns], bias[kColumns];

  __device__ __forceinline__ Statistics(const BatchNormParams& p, const Places& places,
                                        const Share<T, V, MATRIX>& share) {
    share.load_row(places, p.stats, mean);
    share.load_row(places, p.stats + 2 * p.channels, scale);
    share.load_row(places, p.stats + 3 * p.channels, bias);
  }

  // x - mean, and dz.
  __device__ __forceinline__ void differentiate(const Pair<T, V>& pair, Activation activation,
                                                float (&x)[V], float (&gradient)[V]) const {
    float z[V];
    widen_all(pair.x, x);
    widen_all(pair.gradient, gradient);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int c = MATRIX ? i : 0;
      x[i] -= mean[c], z[i] = fmaf(x[i], scale[c], bias[c]);
    }
    multiply_by_derivative<T>(gradient, z, activation);
  }
};

// Afterwards the threads of a block's first row have the sums over all rows of their lane.
template <int N>
__device__ __forceinline__ void sum_over_rows(float (&sums)[N], int row, const Places& places) {
  __shared__ float parts[N][kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  for (int rows = places.rows; rows > 1;) {
    const int half = (rows + 1) / 2;
    if (row >= half && row < rows) {
#pragma unroll
      for (int i = 0; i < N; ++i) parts[i][thread] = sums[i];
    }
    __syncthreads();
    if (row < rows - half) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += parts[i][thread + half * places.lanes];
    }
    __syncthreads();
    rows = half;
  }
}

// K of a channel: the mean of some of its values; of type T, as the values are. With more digits,
// every x - K would be rounded the same way when it is added to a large sum.
constexpr int kOriginValues = 8;

// Which of a channel's values: multiples of the golden ratio, modulo 1, lie all over the batch and
// not on the border of its images.
__device__ __forceinline__ uint32_t origin_position(const Places& places, int i) {
  constexpr uint32_t kGoldenRatio = 0x9e3779b9u;  // times 2^32, without its 1
  return __umulhi(places.values, (i + 1) * kGoldenRatio);
}

template <typename T>
__device__ __forceinline__ float origin_of(const BatchNormParams& p, const Places& places,
                                           int channel) {
  const T* const input = static_cast<const T*>(p.input) + int64_t{channel} * places.channel_step;
  float values[kOriginValues], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOriginValues; ++i) {
    uint32_t pixel;
    const int64_t image = places.by_pixels.divide(origin_position(places, i), &pixel);
    values[i] = widen(input[(image * p.channels * p.pixels) + int64_t{pixel} * places.pixel_step]);
  }
#pragma unroll
  for (int i = 0; i < kOriginValues; ++i) sum += values[i];
  return widen(narrow<T>(sum * (1.0f / kOriginValues)));
}

// The same of the channels of a thread.
template <typename T, int V, bool MATRIX>
__device__ __forceinline__ void load_origins(const BatchNormParams& p, const Places& places,
                                             const Share<T, V, MATRIX>& share,
                                             float (&origins)[Share<T, V, MATRIX>::kColumns]) {
  if constexpr (!MATRIX) {
    origins[0] = origin_of<T>(p, places, share.column);
  } else if (places.by_columns.value == 1) {
    const T* const input = static_cast<const T*>(p.input) + share.column;
#pragma unroll
    for (int c = 0; c < V; ++c) origins[c] = 0.0f;
#pragma unroll 4
    for (int i = 0; i < kOriginValues; ++i) {
      float x[V];
      load(input + int64_t{origin_position(places, i)} * places.columns, x);
#pragma unroll
      for (int c = 0; c < V; ++c) origins[c] += x[c];
    }
#pragma unroll
    for (int c = 0; c < V; ++c) origins[c] = widen(narrow<T>(origins[c] * (1.0f / kOriginValues)));
  } else {
    // Channels have at least V columns.
    const int first = places.channel_of(share.column),
              last = places.channel_of(share.column + V - 1);
    const float of_first = origin_of<T>(p, places, first), of_last = origin_of<T>(p, places, last);
#pragma unroll
    for (int c = 0; c < V; ++c)
      origins[c] = places.channel_of(share.column + c) == first ? of_first : of_last;
  }
}

// Parts of two sums of each channel: forward of x - K and its square, backward of dz and
// dz * (x - mean).
template <typename T, int V, bool MATRIX, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, BACKWARD ? 2 : 3)
    sum_kernel(const BatchNormParams p, const Places places) {
  const Share<T, V, MATRIX> share(places);
  constexpr int N = Share<T, V, MATRIX>::kColumns;
  const T* const input = static_cast<const T*>(p.input);
  float sums[2 * N] = {};
  if constexpr (BACKWARD) {
    const T* const gradients = static_cast<const T*>(p.output_gradient);
    const Statistics<T, V, MATRIX> of(p, places, share);
    share.template for_each<false>(
        p, places,
        [&](int64_t at) {
          return Pair<T, V>{load_words<V>(input + at), load_words<V>(gradients + at)};
        },
        [&](int64_t, const Pair<T, V>& pair) {
          float x[V], gradient[V];
          of.differentiate(pair, p.activation, x, gradient);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = MATRIX ? i : 0;
            sums[c] += gradient[i], sums[N + c] = fmaf(gradient[i], x[i], sums[N + c]);
          }
        });
  } else {
    float origin[N];
    load_origins(p, places, share, origin);
    share.template for_each<false>(
        p, places, [&](int64_t at) { return load_words<V>(input + at); },
        [&](int64_t, const Words<T, V>& words) {
          float x[V];
          widen_all(words, x);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = MATRIX ? i : 0;
            x[i] -= origin[c];
            sums[c] += x[i], sums[N + c] = fmaf(x[i], x[i], sums[N + c]);
          }
        });
  }
  release_next_kernel();
  sum_over_rows(sums, share.row, places);
  if (!share.active || share.row != 0) return;
  float* const target = p.partials + int64_t{blockIdx.y} * 2 * places.columns + share.column;
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = sums[i], target[places.columns + i] = sums[N + i];
}

// A channel's values, of one of three types.
__device__ __forceinline__ float load_as(const void* source, int at, DataType type) {
  switch (type) {
    case DataType::kFloat16:
      return widen(static_cast<const __half*>(source)[at]);
    case DataType::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(source)[at]);
    default:
      return static_cast<const float*>(source)[at];
  }
}
__device__ __forceinline__ void store_as(void* target, int at, DataType type, float value) {
  switch (type) {
    case DataType::kFloat16:
      static_cast<__half*>(target)[at] = narrow<__half>(value);
      break;
    case DataType::kBFloat16:
      static_cast<__nv_bfloat16*>(target)[at] = narrow<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(target)[at] = value;
  }
}

constexpr int kWarp = 32, kWarps = 8;  // of a block that adds up the parts: a warp has a channel

// The sums of all parts for the channel of this warp, the same in all of its lanes.
struct Totals {
  double first = 0.0, second = 0.0;
  int channel;
  bool answers;  // for the channel

  __device__ __forceinline__ Totals(const BatchNormParams& p, const Places& places) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    channel = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
    answers = lane == 0 && channel < p.channels;
    if (channel >= p.channels) return;
    const auto columns = static_cast<int>(places.by_columns.value);
    const float* const part = p.partials + int64_t{channel} * columns;
#pragma unroll 4
    for (int i = lane; i < places.splits * columns; i += kWarp) {
      uint32_t column;
      const int64_t split = places.by_columns.divide(i, &column);
      const float* const at = part + split * 2 * places.columns + column;
      first += at[0], second += at[places.columns];
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      first += shuffled(first, offset), second += shuffled(second, offset);
  }
};

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps)
    statistics_kernel(const BatchNormParams p, const Places places) {
  await_previous_kernel();
  release_next_kernel();
  if (p.batches != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*p.batches;
  const Totals totals(p, places);
  if (!totals.answers) return;
  const int c = totals.channel;
  const double count = static_cast<double>(p.batch) * p.pixels;
  const double shifted = totals.first / count;
  const double origin = origin_of<T>(p, places, c);
  double variance = totals.second / count - shifted * shifted;
  if (variance < 0.0) variance = 0.0;  // not max, which would drop NaN
  const auto mean = static_cast<float>(origin + shifted);
  const double factor = 1.0 / sqrt(variance + static_cast<double>(p.eps));
  const double weight = p.weight == nullptr ? 1.0 : load_as(p.weight, c, p.parameter_type);
  p.stats[c] = mean, p.stats[p.channels + c] = static_cast<float>(factor);
  p.stats[2 * p.channels + c] = static_cast<float>(weight * factor);
  p.stats[3 * p.channels + c] = p.bias == nullptr ? 0.0f : load_as(p.bias, c, p.parameter_type);
  const auto step = [&](void* running, double value) {
    if (running == nullptr) return;
    const float before = load_as(running, c, p.running_type);
    const auto now = static_cast<float>((1.0 - p.momentum) * before + p.momentum * value);
    store_as(running, c, p.running_type, now);
  };
  step(p.running_mean, mean);
  step(p.running_var, variance * (count / (count - 1.0)));
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps)
    terms_kernel(const BatchNormParams p, const Places places) {
  await_previous_kernel();
  release_next_kernel();
  const Totals totals(p, places);
  if (!totals.answers) return;
  const int c = totals.channel;
  const double count = static_cast<double>(p.batch) * p.pixels;
  const double factor = p.stats[p.channels + c], scale = p.stats[2 * p.channels + c];
  const double weight_gradient = totals.second * factor;
  if (p.weight_gradient != nullptr)
    store_as(p.weight_gradient, c, p.parameter_type, static_cast<float>(weight_gradient));
  if (p.bias_gradient != nullptr)
    store_as(p.bias_gradient, c, p.parameter_type, static_cast<float>(totals.first));
  p.terms[c] = static_cast<float>(-scale * totals.first / count);
  p.terms[p.channels + c] = static_cast<float>(-scale * factor * weight_gradient / count);
}

template <typename T, int V, bool MATRIX, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, BACKWARD ? 2 : 3)
    normalize_kernel(const BatchNormParams p, const Places places) {
  await_previous_kernel();
  const Share<T, V, MATRIX> share(places);
  constexpr int N = Share<T, V, MATRIX>::kColumns;
  const T* const input = static_cast<const T*>(p.input);
  T* const output = static_cast<T*>(p.output);
  const Statistics<T, V, MATRIX> of(p, places, share);
  if constexpr (BACKWARD) {
    const T* const gradients = static_cast<const T*>(p.output_gradient);
    float added[N], slope[N];
    share.load_row(places, p.terms, added);
    share.load_row(places, p.terms + p.channels, slope);
    share.template for_each<true>(
        p, places,
        [&](int64_t at) {
          return Pair<T, V>{load_words<V>(input + at), load_words<V>(gradients + at)};
        },
        [&](int64_t at, const Pair<T, V>& pair) {
          float x[V], gradient[V];
          of.differentiate(pair, p.activation, x, gradient);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = MATRIX ? i : 0;
            gradient[i] = fmaf(gradient[i], of.scale[c], fmaf(x[i], slope[c], added[c]));
          }
          store(output + at, gradient);
        });
  } else {
    share.template for_each<true>(
        p, places, [&](int64_t at) { return load_words<V>(input + at); },
        [&](int64_t at, const Words<T, V>& words) {
          float x[V];
          widen_all(words, x);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = MATRIX ? i : 0;
            x[i] = fmaf(x[i] - of.mean[c], of.scale[c], of.bias[c]);
          }
          activate(x, p.activation);
          store(output + at, x);
        });
  }
}

template <typename T, int V, bool MATRIX, bool BACKWARD>
cudaError_t launch_cut(const BatchNormParams& p, const Cut& cut, cudaStream_t stream) {
  Places places{};
  if (!MATRIX) places.by_plane = Divisor(static_cast<uint32_t>(p.pixels / V));
  places.by_columns = Divisor(static_cast<uint32_t>(cut.columns_of_channel));
  places.positions = static_cast<uint32_t>(cut.positions);
  places.columns = static_cast<uint32_t>(cut.columns);
  places.lanes = cut.lanes, places.rows = cut.rows, places.splits = cut.splits;
  const bool last = p.layout == Layout::kChannelsLast;
  places.channel_step = last ? 1 : p.pixels, places.pixel_step = last ? p.channels : 1;
  places.by_pixels = Divisor(static_cast<uint32_t>(p.pixels));
  places.values = static_cast<uint32_t>(p.batch) * p.pixels;
  const dim3 grid(cut.chunks, cut.splits);
  const auto channel_blocks = static_cast<unsigned>(ceil_div(p.channels, kWarps));
  constexpr int kTotalThreads = kWarp * kWarps;
  sum_kernel<T, V, MATRIX, BACKWARD><<<grid, kThreads, 0, stream>>>(p, places);
  cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  const auto totals = BACKWARD ? terms_kernel<T> : statistics_kernel<T>;
  status = launch_dependent(totals, channel_blocks, kTotalThreads, stream, p, places);
  if (status != cudaSuccess || p.output == nullptr) return status;
  return launch_dependent(normalize_kernel<T, V, MATRIX, BACKWARD>, grid, kThreads, stream, p,
                          places);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const BatchNormParams& p, const Cut& cut, bool backward,
                         cudaStream_t stream) {
  constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
  const auto launch = [&]<int V>() {
    if (cut.matrix) {
      return backward ? launch_cut<T, V, true, true>(p, cut, stream)
                      : launch_cut<T, V, true, false>(p, cut, stream);
    }
    return backward ? launch_cut<T, V, false, true>(p, cut, stream)
                    : launch_cut<T, V, false, false>(p, cut, stream);
  };
  if (cut.vector == kWide) return launch.template operator()<kWide>();
  if (cut.vector == kWide / 2) return launch.template operator()<kWide / 2>();
  return launch.template operator()<1>();
}

}  // namespace batch_norm
}  // namespace dwswap
