// channels_last, 3 x 3, stride 1 and 2, any number of channels and any alignment. sm_80 and later.
//
// No shared memory, no descriptor and no barrier: little set-up for small problems, and accesses as
// narrow as pixels that begin anywhere want them.
//
// A thread owns neighbouring channels, an access wide, of kColumns pixels of a row of output, and
// walks down a strip. Lanes run over the channels first, so that the accesses of a warp follow each
// other in memory whatever the number of channels. Each element is loaded and converted once, and
// used by the rows of output whose windows hold it. Two rows are on their way: one is loaded again
// as soon as it is used, before the arithmetic of the other.
#pragma once

#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/channel_direct_cut.h"
#include "depthwise_conv2d/channel_pairs.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace channel_direct {

template <typename T_, int CHANNELS_, int COLUMNS_, int STRIDE_, Form FORM_>
struct Traits {
  using T = T_;
  static constexpr int kChannels = CHANNELS_;
  static constexpr int kColumns = COLUMNS_;
  static constexpr int kStride = STRIDE_;
  static constexpr Form kForm = FORM_;  // kRelu is kClamp
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + kKernel;
  // Activations and many columns want registers.
  static constexpr int kMinBlocks = FORM_ == Form::kPlain && kInputColumns < 9 ? 5 : 4;
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int rows;  // of output, per thread
  uint32_t threads;
  Divisor by_vectors, by_groups, by_strips;
  bool reversed_taps;
  Activation input_activation, activation;
};

// Adds pixel i of a row of input to the outputs whose windows hold it; the row is row kh of theirs.
template <typename Traits>
__device__ __forceinline__ void add_pixel(float (&sums)[Traits::kColumns * Traits::kChannels],
                                          const float (&pixel)[Traits::kChannels], int i,
                                          const float (&taps)[Traits::kChannels][kKernel * kKernel],
                                          int kh) {
  constexpr int V = Traits::kChannels;
#pragma unroll
  for (int column = 0; column < Traits::kColumns; ++column) {
    const int kw = i - column * Traits::kStride;
    if (kw < 0 || kw >= kKernel) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[column * V + v] += pixel[v] * taps[v][kh * kKernel + kw];
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kMinBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = kKernel, S = Traits::kStride, V = Traits::kChannels;
  constexpr int COLUMNS = Traits::kColumns, IN_COLUMNS = Traits::kInputColumns;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.threads) return;
  uint32_t vector, group, strip;
  const uint32_t n =
      a.by_strips.divide(a.by_groups.divide(a.by_vectors.divide(index, &vector), &group), &strip);
  const int c = static_cast<int>(vector) * V;
  const int ow = static_cast<int>(group) * COLUMNS;
  const int oh = static_cast<int>(strip) * a.rows;
  const int iw = ow * S - a.padding_w;
  const int ih = oh * S - a.padding_h;
  const int columns = min(COLUMNS, a.out_w - ow);
  const int rows = min(a.rows, a.out_h - oh);
  // Where the rows end that the image has and the strip needs.
  const auto end = static_cast<unsigned>(max(0, min(a.in_h, ih + (rows - 1) * S + K)));
  bool inside[IN_COLUMNS];
#pragma unroll
  for (int i = 0; i < IN_COLUMNS; ++i) {
    inside[i] = static_cast<unsigned>(iw + i) < static_cast<unsigned>(a.in_w) &&
                i <= (columns - 1) * S + K - 1;
  }
  const int in_row = a.in_w * a.channels, out_row = a.out_w * a.channels;
  const T* source = static_cast<const T*>(a.input) +
                    (static_cast<int64_t>(n) * a.in_h + ih) * in_row +
                    static_cast<int64_t>(iw) * a.channels + c;
  T* target = static_cast<T*>(a.output) + (static_cast<int64_t>(n) * a.out_h + oh) * out_row +
              static_cast<int64_t>(ow) * a.channels + c;

  using Row = Words<T, V>[IN_COLUMNS];
  // Columns outside the image are never loaded and stay what they are.
  Words<T, V> outside{};
  Row even{}, odd{};
  int next = ih;
  const auto fetch = [&](Row& row) {
    if (static_cast<unsigned>(next) < end) {
#pragma unroll
      for (int i = 0; i < IN_COLUMNS; ++i) load_where(inside[i], source + i * a.channels, row[i]);
    } else {
#pragma unroll
      for (int i = 0; i < IN_COLUMNS; ++i) set(row[i], outside);
    }
    ++next, source += in_row;
  };
  fetch(even);
  fetch(odd);
  float taps[V][K * K], bias[V] = {}, input_bias[V] = {};
  load_taps(static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * (K * K), taps,
            a.reversed_taps);
  if (a.bias != nullptr) load(static_cast<const T*>(a.bias) + c, bias);
  if (a.input_bias != nullptr) load(static_cast<const T*>(a.input_bias) + c, input_bias);
  constexpr Form FORM = Traits::kForm;
  const InputForm<FORM, T, V> input_form(input_bias, a.input_activation);
  const OutputForm<FORM, T, V> output_form(a.activation);
  float start[V];
#pragma unroll
  for (int v = 0; v < V; ++v) start[v] = input_form.start(v, bias[v], taps[v]);
  if constexpr (FORM != Form::kPlain && FORM != Form::kAny) {
    // The loads of the first rows did not wait for input_bias.
    outside = input_form.outside();
#pragma unroll
    for (int i = 0; i < IN_COLUMNS; ++i) {
      if (!inside[i] || static_cast<unsigned>(ih) >= end) even[i] = outside;
      if (!inside[i] || static_cast<unsigned>(ih + 1) >= end) odd[i] = outside;
    }
  }

  using Sums = float[COLUMNS * V];
  const auto begin = [&](Sums& sums) {
#pragma unroll
    for (int i = 0; i < COLUMNS * V; ++i) sums[i] = start[i % V];
  };
  const auto copy = [](Sums& to, const Sums& from) {
#pragma unroll
    for (int i = 0; i < COLUMNS * V; ++i) to[i] = from[i];
  };
  // use(pixel, i) for the pixels of the older of the two rows that were fetched.
  const auto for_each_pixel = [&](const Row& row, auto&& use) {
#pragma unroll
    for (int i = 0; i < IN_COLUMNS; ++i) {
      // Registers of what is outside have what is zero after the activation, but for kAny.
      const bool in_image = inside[i] && static_cast<unsigned>(next - 2) < end;
      float pixel[V];
      input_form.template apply<1, FORM == Form::kAny>([&](int) { return row[i]; },
                                                       in_image ? 1 : 0, a.input_activation, pixel);
      use(pixel, i);
    }
  };
  const auto write = [&](Sums& sums) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      float pixel[V];
#pragma unroll
      for (int v = 0; v < V; ++v) pixel[v] = sums[i * V + v];
      if constexpr (FORM == Form::kAny) activate(pixel, a.activation);
      const Words<T, V> words = output_form.apply(pixel);
      if (i < columns) store_words<V>(target + i * a.channels, words);
    }
    target += out_row;
  };

  Sums sums, finished;
  begin(sums);
  for_each_pixel(even, [&](auto& x, int i) { add_pixel<Traits>(sums, x, i, taps, 0); });
  fetch(even);
  if constexpr (S == 2) {
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      for_each_pixel(odd, [&](auto& x, int i) { add_pixel<Traits>(sums, x, i, taps, 1); });
      fetch(odd);
      copy(finished, sums);
      begin(sums);
      for_each_pixel(even, [&](auto& x, int i) {
        add_pixel<Traits>(finished, x, i, taps, 2);
        add_pixel<Traits>(sums, x, i, taps, 0);
      });
      fetch(even);
      write(finished);
    }
  } else {
    Sums newer;
    begin(newer);
    for_each_pixel(odd, [&](auto& x, int i) {
      add_pixel<Traits>(sums, x, i, taps, 1);
      add_pixel<Traits>(newer, x, i, taps, 0);
    });
    fetch(odd);
    const auto step = [&](Row& row) {
      copy(finished, sums);
      copy(sums, newer);
      begin(newer);
      for_each_pixel(row, [&](auto& x, int i) {
        add_pixel<Traits>(finished, x, i, taps, 2);
        add_pixel<Traits>(sums, x, i, taps, 1);
        add_pixel<Traits>(newer, x, i, taps, 0);
      });
      fetch(row);
      write(finished);
    };
#pragma unroll 1
    for (int r = 0; r < rows; r += 2) {
      step(even);
      if (r + 1 == rows) break;
      step(odd);
    }
  }
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Cut& cut, cudaStream_t stream) {
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.rows = cut.rows;
  a.threads = static_cast<uint32_t>(cut.threads(p));
  a.by_vectors = Divisor(static_cast<uint32_t>(ceil_div(p.channels, cut.channels)));
  a.by_groups = Divisor(static_cast<uint32_t>(ceil_div(p.out_w, cut.columns)));
  a.by_strips = Divisor(static_cast<uint32_t>(ceil_div(p.out_h, cut.rows)));
  a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;
  const auto blocks = static_cast<unsigned>(ceil_div(a.threads, kThreads));
  kernel<Traits><<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, int multiprocessors, cudaStream_t stream) {
  const Cut cut = choose_cut(p, sizeof(T), multiprocessors);
#define DWSWAP_DIRECT_CASE(CHANNELS, COLUMNS, STRIDE)                               \
  if (cut.channels == CHANNELS && cut.columns == COLUMNS && p.stride_h == STRIDE) { \
    return visit_form(form_of(p), [&](auto form) {                                  \
      constexpr Form FORM = relu_as_clamp(decltype(form)::value);                   \
      return launch<Traits<T, CHANNELS, COLUMNS, STRIDE, FORM>>(p, cut, stream);    \
    });                                                                             \
  }
  DWSWAP_DIRECT_CASE(2, 4, 1)
  DWSWAP_DIRECT_CASE(2, 2, 2)
  if constexpr (sizeof(T) == 4) {
    DWSWAP_DIRECT_CASE(2, 4, 2)
  }
  DWSWAP_DIRECT_CASE(1, 4, 1)
  DWSWAP_DIRECT_CASE(1, 2, 2)
#undef DWSWAP_DIRECT_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const DepthwiseConv2dParams&, int, cudaStream_t)

}  // namespace channel_direct
}  // namespace dwswap
