// channels_last, 3 x 3, stride 1 and 2, on sm_90.
//
// A block owns a column of an image: some channels, some columns of pixels, and rows from top to
// bottom, or a part of them. Bulk tensor copies (TMA) bring chunks of a few rows into a ring of
// stages in shared memory, so no row is read twice but where a column is cut; what lies outside the
// image arrives as zeros.
//
// A thread owns two neighbouring channels of kColumns pixels of a row, and walks down with the
// chunks: each element is loaded and converted once, and used by the kOpenRows rows of output whose
// windows hold it.
#pragma once

#include <type_traits>

#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/channel_columns_cut.h"
#include "depthwise_conv2d/channel_pairs.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace channel_columns {

template <typename T_, int STRIDE_, int COLUMNS_, Form FORM_>
struct Traits {
  using T = T_;
  // Of output, per thread: 7 divides the image widths of most networks, 4 those that are powers
  // of 2.
  static constexpr int kColumns = COLUMNS_;
  static constexpr int kStride = STRIDE_;
  static constexpr Form kForm = FORM_;
  // Rows of output that an input row contributes to. A chunk has as many steps, of kStride rows
  // each, so that sums keep their registers from chunk to chunk.
  static constexpr int kOpenRows = (kKernel + STRIDE_ - 1) / STRIDE_;
  static constexpr int kChunkRows = kOpenRows * STRIDE_;
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + kKernel;
};

struct Arguments {
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int pairs, groups, rows, stages;
  int tile_w;            // columns of input per block
  uint32_t chunk_bytes;  // multiple of 128, as the alignment of a copy
  uint32_t box_bytes;
  Divisor by_slices, by_tiles, by_segments, by_pairs;
  bool reversed_taps;
  Activation input_activation, activation;
};

template <typename Traits>
__global__ void __launch_bounds__(kMaxThreads, 4)
    kernel(const __grid_constant__ CUtensorMap map, const Arguments a) {
#if DWSWAP_BULK_COPIES
  using T = typename Traits::T;
  constexpr int K = kKernel, S = Traits::kStride, OPEN = Traits::kOpenRows;
  constexpr int COLUMNS = Traits::kColumns, IN_COLUMNS = Traits::kInputColumns;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t arrived[kMaxStages];
  T* const tile_taps = reinterpret_cast<T*>(shared + a.stages * a.chunk_bytes);

  uint32_t slice, tile, segment, pair;
  const uint32_t n = a.by_segments.divide(
      a.by_tiles.divide(a.by_slices.divide(blockIdx.x, &slice), &tile), &segment);
  const int tile_channels = 2 * a.pairs;
  const int first_channel = slice * tile_channels;
  const int tile_column = tile * a.groups * COLUMNS;
  const int first_row = segment * a.rows;
  const int rows = min(a.rows, a.out_h - first_row);
  const int chunks = (rows + OPEN - 1 + OPEN - 1) / OPEN;
  const int ih = first_row * S - a.padding_h;
  const auto fetch = [&](int chunk, int stage, uint32_t more_bytes) {
    barrier_expect(&arrived[stage], a.box_bytes + more_bytes);
    copy_box(shared + stage * a.chunk_bytes, &map, &arrived[stage], first_channel,
             tile_column * S - a.padding_w, ih + chunk * Traits::kChunkRows, n);
  };
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) barrier_init(&arrived[i]);
    const auto tap_bytes = static_cast<uint32_t>(min(tile_channels, a.channels - first_channel) *
                                                 K * K * static_cast<int>(sizeof(T)));
    for (int i = 0; i < min(a.stages, chunks); ++i) {
      fetch(i, i, i == 0 ? tap_bytes : 0);
      if (i == 0) {
        copy_bytes(tile_taps,
                   static_cast<const T*>(a.weight) + static_cast<int64_t>(first_channel) * K * K,
                   tap_bytes, &arrived[0]);
      }
    }
  }
  __syncthreads();

  const auto group = static_cast<int>(a.by_pairs.divide(threadIdx.x, &pair));
  const int c = first_channel + 2 * static_cast<int>(pair);
  const int ow = tile_column + group * COLUMNS;
  const int iw = ow * S - a.padding_w;
  // Threads without work stay for the barriers.
  const bool busy = group < a.groups && c < a.channels && ow < a.out_w;
  const int columns = busy ? min(COLUMNS, a.out_w - ow) : 0;
  float bias[2] = {}, input_bias[2] = {};
  if (busy && a.bias != nullptr) load(static_cast<const T*>(a.bias) + c, bias);
  if (busy && a.input_bias != nullptr) load(static_cast<const T*>(a.input_bias) + c, input_bias);
  const int64_t out_row = static_cast<int64_t>(a.out_w) * a.channels;
  T* target = static_cast<T*>(a.output) +
              (static_cast<int64_t>(n) * a.out_h + first_row) * out_row +
              static_cast<int64_t>(ow) * a.channels + c;

  const InputForm<Traits::kForm, T, 2> input_form(input_bias, a.input_activation);
  const OutputForm<Traits::kForm, T, 2> output_form(a.activation);
  const uint32_t inside = columns_inside<IN_COLUMNS>(iw, a.in_w, (columns - 1) * S + K);

  // sums[q] is the row of output whose window began q steps ago.
  float sums[OPEN][2 * COLUMNS];
  float taps[2][K * K], start[2];
  // The rows of a chunk.
  const auto advance = [&](auto masked, int chunk, const T* row) {
    const int pitch = a.tile_w * tile_channels;
#pragma unroll
    for (int step = 0; step < OPEN; ++step) {
#pragma unroll
      for (int j = 0; j < S; ++j, row += pitch) {
        const int y = ih + chunk * Traits::kChunkRows + step * S + j;
        const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.in_h);
        float x[2 * IN_COLUMNS];
        input_form.template apply<IN_COLUMNS, decltype(masked)::value>(
            [&](int pixel) { return load_words<2>(row + pixel * tile_channels); },
            row_inside ? inside : 0, a.input_activation, x);
#pragma unroll
        for (int q = 0; q < OPEN; ++q) {
          const int kh = S * q + j;
          if (kh >= K) continue;
#pragma unroll
          for (int kw = 0; kw < K; ++kw) {
#pragma unroll
            for (int i = 0; i < 2 * COLUMNS; ++i) {
              sums[q][i] += x[2 * (i / 2 * S + kw) + i % 2] * taps[i % 2][kh * K + kw];
            }
          }
        }
      }
      const int oh = chunk * OPEN + step - (OPEN - 1);
      if (static_cast<unsigned>(oh) < static_cast<unsigned>(rows)) {
        auto& finished = sums[OPEN - 1];
        if constexpr (Traits::kForm == Form::kAny) activate(finished, a.activation);
        T* element = target;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i, element += a.channels) {
          if (i < columns) {
            float value[2] = {finished[2 * i], finished[2 * i + 1]};
            store_words<2>(element, output_form.apply(value));
          }
        }
        target += out_row;
      }
#pragma unroll
      for (int q = OPEN - 1; q > 0; --q) {
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; ++i) sums[q][i] = sums[q - 1][i];
      }
#pragma unroll
      for (int i = 0; i < 2 * COLUMNS; ++i) sums[0][i] = start[i % 2];
    }
  };

  int stage = 0;
  uint32_t parity = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    barrier_wait(&arrived[stage], parity);
    if (chunk == 0) {
      load_taps(tile_taps + 2 * (busy ? pair : 0) * (K * K), taps, a.reversed_taps);
#pragma unroll
      for (int e = 0; e < 2; ++e) start[e] = input_form.start(e, bias[e], taps[e]);
#pragma unroll
      for (int q = 0; q < OPEN; ++q) {
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; ++i) sums[q][i] = start[i % 2];
      }
    }
    const T* row = reinterpret_cast<const T*>(shared + stage * a.chunk_bytes) +
                   (busy ? group : 0) * COLUMNS * S * tile_channels + 2 * (busy ? pair : 0);
    const int first_ih = ih + chunk * Traits::kChunkRows;
    // Two bodies, so that only warps at the border look at what is outside; the switches of kAny
    // are long enough in one.
    const bool at_border =
        inside != (1u << IN_COLUMNS) - 1 || first_ih < 0 || first_ih + Traits::kChunkRows > a.in_h;
    if constexpr (Traits::kForm == Form::kPlain) {
      advance(std::false_type(), chunk, row);
    } else if constexpr (Traits::kForm == Form::kAny) {
      advance(std::true_type(), chunk, row);
    } else if (__any_sync(~0u, at_border)) {
      advance(std::true_type(), chunk, row);
    } else {
      advance(std::false_type(), chunk, row);
    }
    if (chunk + a.stages < chunks) {
      __syncthreads();
      if (threadIdx.x == 0) fetch(chunk + a.stages, stage, 0);
    }
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
#else
  __trap();  // the host chose it for an image of sm_90
#endif
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Cut& cut, cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int S = Traits::kStride;
  const int tile_channels = 2 * cut.pairs;
  Arguments a{};
  a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias, a.output = p.output;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.pairs = cut.pairs, a.groups = cut.groups, a.rows = cut.rows, a.stages = cut.stages;
  a.tile_w = (cut.groups * cut.columns - 1) * S + kKernel;
  a.box_bytes = static_cast<uint32_t>(tile_channels * a.tile_w * Traits::kChunkRows * sizeof(T));
  a.chunk_bytes = static_cast<uint32_t>(ceil_div(a.box_bytes, 128) * 128);
  const auto slices = static_cast<uint32_t>(ceil_div(p.channels, tile_channels));
  const auto tiles = static_cast<uint32_t>(ceil_div(p.out_w, cut.groups * cut.columns));
  const auto segments = static_cast<uint32_t>(ceil_div(p.out_h, cut.rows));
  a.by_slices = Divisor(slices), a.by_tiles = Divisor(tiles), a.by_segments = Divisor(segments);
  a.by_pairs = Divisor(static_cast<uint32_t>(cut.pairs));
  a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;

  CUtensorMap map{};
  if (!encode_input<T>(&map, p, {tile_channels, a.tile_w, Traits::kChunkRows, 1})) {
    return cudaErrorInvalidValue;
  }
  const auto shared =
      static_cast<int>(cut.stages * a.chunk_bytes + tile_channels * kKernel * kKernel * sizeof(T));
  const auto function = kernel<Traits>;
  if (shared + kMaxStages * static_cast<int>(sizeof(uint64_t)) > 48 * 1024) {
    // The most of any cut: threads that launch at the same time must not lower each other's limit.
    const cudaError_t status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
    if (status != cudaSuccess) return status;
  }
  const auto blocks = static_cast<unsigned>(p.batch * slices * tiles * segments);
  const auto threads = static_cast<unsigned>(ceil_div(cut.threads(), 32) * 32);
  function<<<blocks, threads, shared, stream>>>(map, a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, int multiprocessors, cudaStream_t stream) {
  const Cut cut = choose_cut(p, sizeof(T), multiprocessors);
  if (cut.rows == 0) return cudaErrorInvalidValue;
#define DWSWAP_COLUMNS_CASE(S, COLUMNS)                                              \
  if constexpr (is_compiled(S, sizeof(T))) {                                         \
    if (p.stride_h == S && cut.columns == COLUMNS) {                                 \
      return visit_form(form_of(p), [&](auto form) {                                 \
        return launch<Traits<T, S, COLUMNS, decltype(form)::value>>(p, cut, stream); \
      });                                                                            \
    }                                                                                \
  }
  DWSWAP_COLUMNS_CASE(1, 7)
  DWSWAP_COLUMNS_CASE(1, 4)
  DWSWAP_COLUMNS_CASE(2, 7)
  DWSWAP_COLUMNS_CASE(2, 4)
#undef DWSWAP_COLUMNS_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const DepthwiseConv2dParams&, int, cudaStream_t)

}  // namespace channel_columns
}  // namespace dwswap
