// 3 x 3, any stride and dilation, both layouts, any number of channels and any alignment.
//
// For problems so small that the time is that of a launch and of waiting for memory: a thread has a
// pixel or two, in channels_last of up to 16 bytes of neighbouring channels, and asks for all that
// it needs at once. Lanes run over what is consecutive in memory. Where that is the channels, taps
// are read by the block, in their order: one by one, those of a warp would be in 9 lines each.
#pragma once

#include "common/alignment.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/channel_pairs.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/points.h"

namespace dwswap {
namespace points {

// How threads share the work.
struct Cut {
  int channels;  // of a thread, neighbours
  int pixels;    // of a thread, neighbours of a row
  int stride;    // of those pixels, in dilations; of one pixel 1
  int lanes;     // channels_last: threads side by side along the channels, at most
};

template <typename T_, Cut CUT, Layout LAYOUT_, Form INPUT_, Form OUTPUT_>
struct Traits {
  using T = T_;
  static constexpr Cut kCut = CUT;
  static constexpr int kColumns = (CUT.pixels - 1) * CUT.stride + kKernel;  // of the windows
  // Vectors of taps that a thread of the smallest block reads for it.
  static constexpr int kTapSteps =
      ceil_div(CUT.lanes * kKernel * kKernel, kThreads - CUT.lanes + 1);
  // Of a multiprocessor, 0 for what the compiler likes: of wide windows that is so many that it
  // moves what it loaded to other registers, and waits for it with the rest not asked for.
  static constexpr int kLeastBlocks = sizeof(T) == 4 && CUT.channels * CUT.pixels >= 8 ? 4 : 0;
  static constexpr bool kChannelsLast = LAYOUT_ == Layout::kChannelsLast;
  static constexpr Form kInput = INPUT_, kOutput = OUTPUT_;  // kRelu is kClamp
  static_assert(CUT.lanes <= kThreads);
  static_assert(kKernel * kColumns <= 32, "one bit each says which are inside");
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, in_h, in_w, out_h, out_w;
  int stride_h, stride_w, padding_h, padding_w;
  int dilation_h, dilation_w;  // below 0 for the last tap first
  int first, step;             // of the pixels of a thread
  uint32_t runs;               // what threads compute, but for the channels of channels_last
  uint32_t vectors;            // channels_last: of a pixel,
  uint32_t lanes, block_runs;  // and how the threads of a block share them
  Divisor by_slices, by_lanes, by_columns, by_images, by_channels;
  Activation input_activation, activation;
};

// What a thread computes.
template <typename Traits>
struct Run {
  bool exists;
  uint32_t before, lane;      // channels_last: vectors in front of the block, and of the block
  int image, c, row, column;  // the image is a plane in NCHW
  int place;                  // of the first pixel in the output, in pixels

  __device__ __forceinline__ explicit Run(const Arguments& a) {
    uint32_t run, w, vector;
    if constexpr (Traits::kChannelsLast) {
      uint32_t slice;
      const uint32_t tile = a.by_slices.divide(blockIdx.x, &slice);
      run = tile * a.block_runs + a.by_lanes.divide(threadIdx.x, &lane);
      before = slice * a.lanes, vector = before + lane;
      exists = run < a.runs && vector < a.vectors;
    } else {
      run = blockIdx.x * kThreads + threadIdx.x;
      before = lane = 0;
      exists = run < a.runs;
    }
    // Not one from the other, which takes twice as long.
    const auto line = static_cast<int>(a.by_columns.divide(run, &w));
    const uint32_t images = a.by_images.divide(run);
    if constexpr (!Traits::kChannelsLast) a.by_channels.divide(images, &vector);
    image = static_cast<int>(images), c = static_cast<int>(vector) * Traits::kCut.channels;
    row = line - image * a.out_h;
    column = static_cast<int>(w) * Traits::kCut.pixels + a.first;
    place = Traits::kCut.pixels == 1 ? static_cast<int>(run) : line * a.out_w + column;
  }
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kLeastBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr Cut CUT = Traits::kCut;
  constexpr int K = kKernel, V = CUT.channels, TAPS = K * K;
  constexpr int COLUMNS = Traits::kColumns, WINDOW = K * COLUMNS;
  constexpr Form INPUT = Traits::kInput, OUTPUT = Traits::kOutput;
  constexpr bool LAST = Traits::kChannelsLast;
  const auto ask = [](bool wanted, const T* source, Words<T, V>& words) {
    if constexpr (LAST) load_where_now(wanted, source, words);
    if constexpr (!LAST) load_where(wanted, source, words);
  };
  const Run<Traits> run(a);
  if (!LAST && !run.exists) return;
  const auto* weight = static_cast<const T*>(a.weight);
  // Of the block, on their way to shared memory.
  constexpr int STEPS = LAST ? Traits::kTapSteps : 1;
  Words<T, V> block_taps[STEPS];
  const uint32_t block_words = LAST ? min(a.lanes, a.vectors - run.before) * TAPS : 0;
  if constexpr (LAST) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const uint32_t word = threadIdx.x + i * blockDim.x;
      ask(word < block_words, weight + (run.before * TAPS + word) * V, block_taps[i]);
    }
  }

  const int ih = run.row * a.stride_h - a.padding_h;
  const int iw = run.column * a.stride_w - a.padding_w;
  // From column to column, and the first pixel of the window.
  const int pitch = LAST ? a.channels : 1;
  const int first = ((run.image * a.in_h + ih) * a.in_w + iw) * pitch + (LAST ? run.c : 0);
  const T* const source = static_cast<const T*>(a.input) + first;
  const int step_h = a.dilation_h * a.in_w * pitch, step_w = a.dilation_w * pitch;

  Words<T, V> window[WINDOW] = {};
  uint32_t inside = 0;
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
    const bool row_inside =
        run.exists && static_cast<unsigned>(ih + kh * a.dilation_h) < static_cast<unsigned>(a.in_h);
#pragma unroll
    for (int kw = 0; kw < COLUMNS; ++kw) {
      const bool wanted = row_inside && static_cast<unsigned>(iw + kw * a.dilation_w) <
                                            static_cast<unsigned>(a.in_w);
      ask(wanted, source + (kh * step_h + kw * step_w), window[kh * COLUMNS + kw]);
      if (wanted) inside |= 1u << (kh * COLUMNS + kw);
    }
  }
  Words<T, V> bias_words = {}, input_bias_words = {};
  ask(run.exists && a.bias != nullptr, static_cast<const T*>(a.bias) + run.c, bias_words);
  ask(INPUT != Form::kPlain && run.exists && a.input_bias != nullptr,
      static_cast<const T*>(a.input_bias) + run.c, input_bias_words);

  float taps[V][TAPS];
  if constexpr (LAST) {
    __shared__ __align__(16) T shared[CUT.lanes * TAPS * V];
    __syncwarp();  // Else the compiler stores, and waits, with half of the window not asked for.
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const uint32_t word = threadIdx.x + i * blockDim.x;
      if (word < block_words) store_words<V>(shared + word * V, block_taps[i]);
    }
    __syncthreads();
    if (!run.exists) return;
    load_taps(shared + run.lane * (V * TAPS), taps);
  } else {
    load_taps(weight + run.c * TAPS, taps);
  }

  float x[WINDOW * V], bias[V], input_bias[V], sums[CUT.pixels * V];
  widen_all(bias_words, bias), widen_all(input_bias_words, input_bias);
  const InputForm<INPUT, T, V> input_form(input_bias, a.input_activation);
  input_form.template apply<WINDOW, INPUT != Form::kPlain>([&](int i) { return window[i]; }, inside,
                                                           a.input_activation, x);
  const OutputForm<OUTPUT, T, V> output_form(a.activation);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float start = input_form.start(v, bias[v], taps[v]);
#pragma unroll
    for (int p = 0; p < CUT.pixels; ++p) {
      float& sum = sums[p * V + v] = start;
#pragma unroll
      for (int t = 0; t < TAPS; ++t)
        sum += x[(t / K * COLUMNS + p * CUT.stride + t % K) * V + v] * taps[v][t];
    }
  }
  if constexpr (OUTPUT == Form::kAny) activate(sums, a.activation);
  T* const target = static_cast<T*>(a.output) + (run.place * pitch + (LAST ? run.c : 0));
#pragma unroll
  for (int p = 0; p < CUT.pixels; ++p) {
    float pixel[V];
#pragma unroll
    for (int v = 0; v < V; ++v) pixel[v] = sums[p * V + v];
    if (CUT.pixels == 1 || run.column + p * a.step < a.out_w)
      store_words<V>(target + p * a.step * pitch, output_form.apply(pixel));
  }
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  constexpr Cut CUT = Traits::kCut;
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.step = 1;
  if (p.reversed_taps) {  // From the last column of the last pixel back.
    a.padding_h -= (kKernel - 1) * a.dilation_h, a.padding_w -= (kKernel - 1) * a.dilation_w;
    a.dilation_h = -a.dilation_h, a.dilation_w = -a.dilation_w;
    a.first = CUT.pixels - 1, a.step = -1;
  }
  const bool last = Traits::kChannelsLast;
  const int64_t vectors = p.channels / CUT.channels, columns = ceil_div(p.out_w, CUT.pixels);
  const int64_t runs = p.batch * p.out_h * columns * (last ? 1 : p.channels);
  // As few lanes as do with as many slices: fewer are idle.
  const int64_t slices = last ? ceil_div(vectors, CUT.lanes) : 1;
  const int64_t lanes = last ? ceil_div(vectors, slices) : 1, block_runs = kThreads / lanes;
  a.runs = static_cast<uint32_t>(runs), a.vectors = static_cast<uint32_t>(vectors);
  a.lanes = static_cast<uint32_t>(lanes), a.block_runs = static_cast<uint32_t>(block_runs);
  a.by_slices = Divisor(static_cast<uint32_t>(slices)), a.by_lanes = Divisor(a.lanes);
  a.by_columns = Divisor(static_cast<uint32_t>(columns));
  a.by_images = Divisor(static_cast<uint32_t>(columns * p.out_h));
  a.by_channels = Divisor(static_cast<uint32_t>(p.channels));
  a.input_activation = p.input_activation, a.activation = p.activation;
  const auto blocks = static_cast<unsigned>(slices * ceil_div(runs, block_runs));
  const auto threads = static_cast<unsigned>(lanes * block_runs);
  kernel<Traits><<<blocks, threads, 0, stream>>>(a);
  return cudaGetLastError();
}

// Windows of neighbours share columns.
constexpr bool shares(const DepthwiseConv2dParams& p, int stride) {
  return p.stride_w == stride * p.dilation_w;
}

// visit.operator()<CUT>() for channels_last. Of activations that are a switch in the kernel a
// window of many channels would be 45 KB of code.
template <typename T, Form INPUT, typename Visit>
cudaError_t visit_cut(const DepthwiseConv2dParams& p, Visit&& visit) {
  constexpr bool kHalf = sizeof(T) == 2, kSwitch = INPUT == Form::kAny;
  const auto has_vectors_of = [&](int channels) {
    return aligned_to(channels * sizeof(T), p.channels * sizeof(T),
                      {p.input, p.weight, p.bias, p.input_bias, p.output});
  };
  if constexpr (!kSwitch) {
    if (has_vectors_of(4)) {
      if (shares(p, 1)) return visit.template operator()<Cut{4, 2, 1, kHalf ? 16 : 8}>();
      if constexpr (!kHalf) {
        if (shares(p, 2)) return visit.template operator()<Cut{4, 2, 2, 8}>();
        return visit.template operator()<Cut{4, 1, 1, 16}>();
      }
    }
    if (has_vectors_of(2)) {
      if (shares(p, 1)) return visit.template operator()<Cut{2, 2, 1, kHalf ? 32 : 16}>();
      if constexpr (kHalf) {
        if (shares(p, 2)) return visit.template operator()<Cut{2, 2, 2, 32}>();
      } else {
        return visit.template operator()<Cut{2, 1, 1, 16}>();
      }
    }
  }
  if constexpr (kHalf) {
    if (has_vectors_of(2)) return visit.template operator()<Cut{2, 1, 1, 32}>();
  }
  return visit.template operator()<Cut{1, 1, 1, 32}>();
}

template <typename T, Form INPUT, Form OUTPUT>
cudaError_t launch_forms(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  if (p.in_layout == Layout::kContiguous) {
    constexpr Layout kLayout = Layout::kContiguous;
    return INPUT != Form::kAny && shares(p, 1)
               ? launch<Traits<T, Cut{1, 2, 1, 32}, kLayout, INPUT, OUTPUT>>(p, stream)
               : launch<Traits<T, Cut{1, 1, 1, 32}, kLayout, INPUT, OUTPUT>>(p, stream);
  }
  return visit_cut<T, INPUT>(p, [&]<Cut CUT>() {
    return launch<Traits<T, CUT, Layout::kChannelsLast, INPUT, OUTPUT>>(p, stream);
  });
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  return visit_form(form_of(p), [&](auto form) {
    constexpr Form FORM = relu_as_clamp(decltype(form)::value);
    // An activation of the output alone is the usual one, and that of a window is most of the code.
    if constexpr (FORM == Form::kClamp || FORM == Form::kAny) {
      if (!p.transforms_input()) return launch_forms<T, Form::kPlain, FORM>(p, stream);
    }
    return launch_forms<T, FORM, FORM>(p, stream);
  });
}

}  // namespace points
}  // namespace dwswap
