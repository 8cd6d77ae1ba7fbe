// Dense layouts, stride 1 and 2, kernel sizes known at compile time. Portable: no shared-memory
// tiles, no instructions newer than sm_80.
//
// One thread computes ROWS rows of one output column for VEC channels. It walks down the input,
// row by row: the KW elements of a row are loaded and converted once and used by every output row
// whose window holds them. Neighbouring threads read neighbouring columns (NCHW) or channels
// (channels_last), so loads coalesce and the overlap of windows is served by L1.
#pragma once

#include <limits>

#include "common/numeric.cuh"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace rolling_rows {

constexpr int kThreads = 256;

// Sizes of one instantiation.
template <typename T_, Layout LAYOUT_, int KH_, int KW_, int STRIDE_>
struct Traits {
  using T = T_;
  static constexpr Layout kLayout = LAYOUT_;
  static constexpr int kKernelH = KH_;
  static constexpr int kKernelW = KW_;
  static constexpr int kStride = STRIDE_;
  static constexpr bool kChannelsLast = kLayout == Layout::kChannelsLast;
  // Weights stay in registers: KH * KW * VEC of them, at most 7 * 7 * 2 = 98.
  static constexpr int kVec = !kChannelsLast ? 1 : KH_ * KW_ <= 9 ? 4 : 2;
  static constexpr int kRows = KH_ * KW_ * kVec >= 49 ? 4 : 8 / STRIDE_;
  static constexpr int kInputRows = (kRows - 1) * STRIDE_ + KH_;
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, multiplier;  // multiplier is 1 for channels_last
  int in_h, in_w, out_h, out_w, padding_h, padding_w;
  int groups;                     // channels_last: vectors of channels per pixel
  uint32_t threads;               // kContiguous: all; kChannelsLast: per group of lanes
  Divisor by_out_w, by_strips, by_channels;
  Activation input_activation, activation;
};

template <typename Traits, bool TRANSFORM>
__device__ __forceinline__ void compute(const Arguments& a,
                                        const typename Traits::T* input,
                                        typename Traits::T* output,
                                        const float (&taps)[Traits::kKernelH][Traits::kKernelW]
                                                           [Traits::kVec],
                                        const float (&bias)[Traits::kVec],
                                        const float (&input_bias)[Traits::kVec], int oh, int ow,
                                        int pixel) {
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW, VEC = Traits::kVec;
  constexpr int ROWS = Traits::kRows, S = Traits::kStride;
  const int ih0 = oh * S - a.padding_h;
  const int iw0 = ow * S - a.padding_w;
  // Offsets within an image fit 32 bits (covers_rolling_rows).
  const int row = a.in_w * pixel;
  int offset = ih0 * row + iw0 * pixel;
  float sums[ROWS][VEC];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) sums[r][j] = bias[j];
  }
#pragma unroll
  for (int i = 0; i < Traits::kInputRows; ++i, offset += row) {
    const bool row_inside = static_cast<unsigned>(ih0 + i) < static_cast<unsigned>(a.in_h);
    float x[KW][VEC];
#pragma unroll
    for (int kw = 0; kw < KW; ++kw) {
      const bool inside =
          row_inside && static_cast<unsigned>(iw0 + kw) < static_cast<unsigned>(a.in_w);
      if (inside) {
        load(input + offset + kw * pixel, x[kw]);
        if constexpr (TRANSFORM) {
#pragma unroll
          for (int j = 0; j < VEC; ++j) x[kw][j] += input_bias[j];
          activate(x[kw], a.input_activation);
        }
      } else {
#pragma unroll
        for (int j = 0; j < VEC; ++j) x[kw][j] = 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int kh = i - r * S;
      if (kh < 0 || kh >= KH) continue;
#pragma unroll
      for (int kw = 0; kw < KW; ++kw) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sums[r][j] += x[kw][j] * taps[kh][kw][j];
      }
    }
  }
  const int out_row = a.out_w * pixel;
  output += oh * out_row + ow * pixel;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (oh + r < a.out_h) {
      activate(sums[r], a.activation);
      store(output + r * out_row, sums[r]);
    }
  }
}

// NCHW. Threads run over columns, then strips of rows, then planes.
template <typename Traits, bool TRANSFORM>
__global__ void __launch_bounds__(kThreads, 2) contiguous_kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.threads) return;
  uint32_t ow, strip, k;
  const uint32_t plane = a.by_strips.divide(a.by_out_w.divide(index, &ow), &strip);
  a.by_channels.divide(plane, &k);
  const uint32_t in_plane = a.multiplier == 1 ? plane : plane / a.multiplier;
  const auto* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(k) * KH * KW;
  float taps[KH][KW][1];
#pragma unroll
  for (int kh = 0; kh < KH; ++kh) {
#pragma unroll
    for (int kw = 0; kw < KW; ++kw) taps[kh][kw][0] = widen(weight[kh * KW + kw]);
  }
  const float bias[1] = {a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[k])};
  const float input_bias[1] = {
      a.input_bias == nullptr ? 0.0f
                              : widen(static_cast<const T*>(a.input_bias)[k / a.multiplier])};
  const auto* input =
      static_cast<const T*>(a.input) + static_cast<int64_t>(in_plane) * a.in_h * a.in_w;
  auto* output = static_cast<T*>(a.output) + static_cast<int64_t>(plane) * a.out_h * a.out_w;
  compute<Traits, TRANSFORM>(a, input, output, taps, bias, input_bias, strip * Traits::kRows, ow,
                             1);
}

// channels_last. threadIdx.x runs over vectors of channels, threadIdx.y and blockIdx.x over
// columns, then strips, then images; blockIdx.y over slices of blockDim.x vectors.
template <typename Traits, bool TRANSFORM>
__global__ void __launch_bounds__(kThreads) channels_last_kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW, VEC = Traits::kVec;
  // Weights lie as (channel, tap) in memory; (tap, channel) serves a vector with one access.
  extern __shared__ float tile[];
  const int lanes = blockDim.x * VEC;
  const int first = blockIdx.y * lanes;
  const int count = min(lanes, a.channels - first);
  const auto* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(first) * KH * KW;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count * KH * KW;
       i += blockDim.x * blockDim.y) {
    const int channel = i / (KH * KW);
    tile[(i - channel * (KH * KW)) * lanes + channel] = widen(weight[i]);
  }
  __syncthreads();
  const int group = blockIdx.y * blockDim.x + threadIdx.x;
  const uint32_t index = blockIdx.x * blockDim.y + threadIdx.y;
  if (group >= a.groups || index >= a.threads) return;
  float taps[KH][KW][VEC];
#pragma unroll
  for (int kh = 0; kh < KH; ++kh) {
#pragma unroll
    for (int kw = 0; kw < KW; ++kw) {
      load(tile + (kh * KW + kw) * lanes + threadIdx.x * VEC, taps[kh][kw]);
    }
  }
  const int c = group * VEC;
  float bias[VEC] = {}, input_bias[VEC] = {};
  if (a.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) bias[j] = widen(static_cast<const T*>(a.bias)[c + j]);
  }
  if (a.input_bias != nullptr) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) input_bias[j] = widen(static_cast<const T*>(a.input_bias)[c + j]);
  }
  uint32_t ow, strip;
  const int64_t n = a.by_strips.divide(a.by_out_w.divide(index, &ow), &strip);
  const auto* input = static_cast<const T*>(a.input) + n * a.in_h * a.in_w * a.channels + c;
  auto* output = static_cast<T*>(a.output) + n * a.out_h * a.out_w * a.channels + c;
  compute<Traits, TRANSFORM>(a, input, output, taps, bias, input_bias, strip * Traits::kRows, ow,
                             a.channels);
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const auto strips = static_cast<uint32_t>((p.out_h + Traits::kRows - 1) / Traits::kRows);
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.channels = static_cast<int>(p.channels), a.multiplier = static_cast<int>(p.multiplier);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.by_out_w = Divisor(static_cast<uint32_t>(p.out_w)), a.by_strips = Divisor(strips);
  a.by_channels = Divisor(static_cast<uint32_t>(p.out_channels()));
  a.input_activation = p.input_activation, a.activation = p.activation;
  const auto columns = static_cast<uint32_t>(p.batch * p.out_w * strips);
  if constexpr (!Traits::kChannelsLast) {
    a.threads = columns * static_cast<uint32_t>(p.out_channels());
    const unsigned blocks = (a.threads + kThreads - 1) / kThreads;
    const auto kernel =
        p.transforms_input() ? contiguous_kernel<Traits, true> : contiguous_kernel<Traits, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(a);
  } else {
    a.groups = a.channels / Traits::kVec;
    a.threads = columns;
    // The fewest idle lanes; among equals the widest slice.
    int lanes = 32;
    for (const int candidate : {16, 8, 4}) {
      const auto padded = [&](int width) { return (a.groups + width - 1) / width * width; };
      if (padded(candidate) < padded(lanes)) lanes = candidate;
    }
    const dim3 block(lanes, kThreads / lanes);
    const dim3 grid((a.threads + block.y - 1) / block.y, (a.groups + lanes - 1) / lanes);
    const size_t shared = sizeof(float) * lanes * Traits::kVec * Traits::kKernelH * Traits::kKernelW;
    const auto kernel = p.transforms_input() ? channels_last_kernel<Traits, true>
                                             : channels_last_kernel<Traits, false>;
    kernel<<<grid, block, shared, stream>>>(a);
  }
  return cudaGetLastError();
}

// The compiled sizes: X(layout, kernel_h, kernel_w, stride).
#define DWSWAP_ROLLING_ROWS_SIZES(X)                                            \
  X(Layout::kContiguous, 3, 3, 1) X(Layout::kContiguous, 3, 3, 2)               \
  X(Layout::kContiguous, 5, 5, 1) X(Layout::kContiguous, 5, 5, 2)               \
  X(Layout::kContiguous, 7, 7, 1) X(Layout::kContiguous, 7, 7, 2)               \
  X(Layout::kContiguous, 3, 1, 1) X(Layout::kContiguous, 1, 3, 1)               \
  X(Layout::kContiguous, 3, 7, 1) X(Layout::kContiguous, 7, 3, 1)               \
  X(Layout::kChannelsLast, 3, 3, 1) X(Layout::kChannelsLast, 3, 3, 2)           \
  X(Layout::kChannelsLast, 5, 5, 1) X(Layout::kChannelsLast, 5, 5, 2)           \
  X(Layout::kChannelsLast, 7, 7, 1) X(Layout::kChannelsLast, 7, 7, 2)

// Calls visit.operator()<Traits>() for the compiled size of the problem. False: there is none.
template <typename T, typename Visit>
bool visit(const DepthwiseConv2dParams& p, Visit&& visit) {
#define DWSWAP_CASE(LAYOUT, KH, KW, S)                                                    \
  if (p.in_layout == LAYOUT && p.kernel_h == KH && p.kernel_w == KW && p.stride_h == S) { \
    visit.template operator()<Traits<T, LAYOUT, KH, KW, S>>();                            \
    return true;                                                                          \
  }
  DWSWAP_ROLLING_ROWS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return false;
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  visit<T>(params, [&]<typename Traits>() { status = launch<Traits>(params, stream); });
  return status;
}

extern template cudaError_t launch_typed<float>(const DepthwiseConv2dParams&, cudaStream_t);
extern template cudaError_t launch_typed<__half>(const DepthwiseConv2dParams&, cudaStream_t);
extern template cudaError_t launch_typed<__nv_bfloat16>(const DepthwiseConv2dParams&,
                                                        cudaStream_t);

}  // namespace rolling_rows
}  // namespace dwswap
