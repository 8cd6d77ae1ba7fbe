// channels_last, stride 1 and 2, kernel sizes known at compile time. sm_80 and later.
//
// A block owns a tile: some channels, columns and rows of the output of one image. On sm_90 one
// bulk tensor copy (TMA) brings the input tile with its border into shared memory: what lies
// outside the image arrives as zeros, so padding costs nothing, and one bulk copy brings the
// weights. Elsewhere, and where the copy engine's alignment does not hold, the threads copy
// asynchronously. Several blocks per SM overlap one's copies with another's arithmetic.
//
// One thread computes kColumns x kRows outputs of two neighbouring channels. It walks down its
// input rows: each element of a row is loaded and converted once, and used by every output whose
// window holds it. For K = 3 that makes about 27 instructions per output pixel and channel pair,
// 18 of them multiply-adds.
//
// With a dilation d, the outputs that are d apart see inputs that are d apart, and no others: d x d
// lattices, each a convolution without dilation. A block has a tile of one of them.
#pragma once

#include <type_traits>

#include "common/async_copy.cuh"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/channel_pairs.cuh"
#include "depthwise_conv2d/channel_tiles_cut.h"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace channel_tiles {

template <typename T_, int K_, int STRIDE_, Depth DEPTH_, Form FORM_, bool DILATED_ = false>
struct Traits {
  using T = T_;
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr Form kForm = FORM_;
  // Of the input: as it is loaded. All others are applied to the tile in place, before it is used.
  static constexpr bool kInLoads = FORM_ == Form::kClamp || FORM_ == Form::kHardswish;
  static constexpr bool kInPlace = !kInLoads && FORM_ != Form::kPlain;
  static constexpr bool kDilated = DILATED_;
  // An odd number of columns keeps groups of lanes in different shared-memory banks; 7 divides the
  // image widths of most networks (7, 14, 28, 56, 112).
  static constexpr int kColumns = channel_tiles::kColumns;
  // Accumulators (2 * 7 * kRows) and weights (2 * K * K) share the registers.
  // A transformed row of stride 2 takes more of them.
  static constexpr bool kTight = STRIDE_ == 2 && kInLoads;
  static constexpr int kRows = DEPTH_ == Depth::kFlat ? 1 : K_ == 7 || (K_ == 5 && kTight) ? 2 : 4;
  static constexpr int kMinBlocks = (K_ == 3 ? 4 : 3) - (kTight && K_ == 3 ? 1 : 0);
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + K_;
  static constexpr int kInputRows = (kRows - 1) * STRIDE_ + K_;
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w, dilation_h, dilation_w;
  int pairs, groups_w, groups_h;
  Reader reader;
  int tile_w, tile_pixels;  // columns and pixels of the input tile
  uint32_t box_bytes;       // of the input tile
  uint32_t tile_bytes;      // the same, rounded up to the alignment of the weights behind it
  Divisor by_slices, by_dilation_w, by_dilation_h, by_tiles_w, by_tiles_h, by_pairs, by_groups_w;
  Divisor by_vectors, by_tile_w;
  bool transforms_input, reversed_taps;
  Activation input_activation, activation;
};

// Rows or columns of a lattice: inputs, outputs, and zeros in front of the inputs; and which of the
// image they are, the first ones and one in `step`.
struct Axis {
  int in, out, padding;
  int first_in = 0, first_out = 0, step = 1;

  __device__ __forceinline__ Axis(int in, int out, int padding)
      : in(in), out(out), padding(padding) {}

  // That of the outputs `first`, first + dilation, ...
  __device__ __forceinline__ Axis(int in_size, int out_size, int zeros, int first, int dilation)
      : first_out(first), step(dilation) {
    padding = (max(zeros - first, 0) + dilation - 1) / dilation;
    first_in = first - zeros + padding * dilation;
    in = (in_size - first_in + dilation - 1) / dilation;
    out = (out_size - first + dilation - 1) / dilation;
  }
};

struct Lattice {
  Axis rows, columns;
};

// Calls visit(element, channel, row, column, inside) for every vector of VEC elements of the tile
// that this thread has: its place in the tile, where it lies in the lattice, and whether it does.
template <int VEC, typename Visit>
__device__ __forceinline__ void for_each_vector(const Arguments& a, const Lattice& lattice,
                                                int first_channel, int first_row, int first_column,
                                                Visit&& visit) {
  const int vectors = a.tile_pixels * static_cast<int>(a.by_vectors.value);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    uint32_t vector, column;
    const uint32_t pixel = a.by_vectors.divide(i, &vector);
    const int row = first_row + static_cast<int>(a.by_tile_w.divide(pixel, &column));
    const int channel = first_channel + static_cast<int>(vector) * VEC;
    column += first_column;
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(lattice.rows.in) &&
                        column < static_cast<unsigned>(lattice.columns.in) && channel < a.channels;
    visit(i * VEC, channel, row, static_cast<int>(column), inside);
  }
}

// Calls body(std::integral_constant<int, BYTES>) for the run-time width of a vector. A pair of
// channels is the least.
template <typename T, typename Body>
__device__ __forceinline__ void for_vector_bytes(int bytes, Body&& body) {
  if (bytes == 16) {
    body(std::integral_constant<int, 16>());
  } else if (bytes == 8) {
    body(std::integral_constant<int, 8>());
  } else if constexpr (sizeof(T) == 2) {
    body(std::integral_constant<int, 4>());
  }
}

template <typename T, int VEC>
__device__ __forceinline__ void read_tile(T* tile, const Arguments& a, const Lattice& lattice,
                                          const T* image, int first_channel, int first_row,
                                          int first_column) {
  constexpr int BYTES = VEC * sizeof(T);
  const Axis &rows = lattice.rows, &columns = lattice.columns;
  for_each_vector<VEC>(a, lattice, first_channel, first_row, first_column,
                       [&](int element, int channel, int row, int column, bool inside) {
                         const T* source = image;
                         if (inside) {
                           const int64_t pixel =
                               static_cast<int64_t>(rows.first_in + row * rows.step) * a.in_w +
                               columns.first_in + column * columns.step;
                           source += pixel * a.channels + channel;
                         }
                         copy_async<BYTES>(tile + element, source, inside ? BYTES : 0);
                       });
}

// input_activation(input + input_bias) of the tile, in place. What lies outside the image stays
// zero: padding comes after the activation. Once per element; the result is rounded to T as it
// would be in a tensor. A thread keeps its channels.
template <Form FORM, typename T, int VEC>
__device__ __forceinline__ void transform_tile(T* tile, const Arguments& a, const Lattice& lattice,
                                               int first_channel, int first_row, int first_column) {
  const bool clamps = FORM == Form::kAny && a.input_activation <= Activation::kRelu6;
  float lows[VEC], highs[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i)
    lows[i] = low_of(a.input_activation), highs[i] = high_of(a.input_activation);
  const Words<T, VEC> low = narrow_all<T>(lows), high = narrow_all<T>(highs);
  const auto vectors = static_cast<int>(a.by_vectors.value);
  const int element = static_cast<int>(threadIdx.x) % vectors * VEC;
  const int first = static_cast<int>(threadIdx.x) / vectors;
  const int step = static_cast<int>(blockDim.x) / vectors;
  const int channel = first_channel + element;
  if (first >= step || channel >= a.channels) return;
  Words<T, VEC> bias{};
  if (a.input_bias != nullptr)
    bias = load_words<VEC>(static_cast<const T*>(a.input_bias) + channel);
  for (int pixel = first; pixel < a.tile_pixels; pixel += step) {
    uint32_t column;
    const int row = first_row + static_cast<int>(a.by_tile_w.divide(pixel, &column));
    if (static_cast<unsigned>(row) >= static_cast<unsigned>(lattice.rows.in) ||
        column + first_column >= static_cast<unsigned>(lattice.columns.in))
      continue;
    T* const at = tile + pixel * vectors * VEC + element;
    Words<T, VEC> words = load_words<VEC>(at);
    if (clamps) {
      // The bounds are exact in T: a sum that is rounded first is the same.
      words = minimum(maximum(sum(words, bias), low), high);
    } else {
      float x[VEC], b[VEC];
      widen_all(words, x), widen_all(bias, b);
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] += b[i];
      activate(x, FORM == Form::kSilu ? Activation::kSilu : a.input_activation);
      words = narrow_all<T>(x);
    }
    store_words<VEC>(at, words);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kMaxThreads, Traits::kMinBlocks)
    kernel(const __grid_constant__ CUtensorMap map, const Arguments a) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  constexpr int ROWS = Traits::kRows, COLUMNS = Traits::kColumns;
  constexpr int IN_COLUMNS = Traits::kInputColumns, IN_ROWS = Traits::kInputRows;

  extern __shared__ __align__(128) unsigned char shared[];
  auto* tile = reinterpret_cast<T*>(shared);
  auto* tile_taps = reinterpret_cast<T*>(shared + a.tile_bytes);

  uint32_t slice, tile_x, tile_y, pair, group_w;
  uint32_t index = a.by_slices.divide(blockIdx.x, &slice);
  const Lattice lattice = [&]() -> Lattice {
    if constexpr (Traits::kDilated) {
      uint32_t row, column;
      index = a.by_dilation_h.divide(a.by_dilation_w.divide(index, &column), &row);
      return {{a.in_h, a.out_h, a.padding_h, static_cast<int>(row), a.dilation_h},
              {a.in_w, a.out_w, a.padding_w, static_cast<int>(column), a.dilation_w}};
    }
    return {{a.in_h, a.out_h, a.padding_h}, {a.in_w, a.out_w, a.padding_w}};
  }();
  const Axis &rows = lattice.rows, &columns = lattice.columns;
  const uint32_t n = a.by_tiles_h.divide(a.by_tiles_w.divide(index, &tile_x), &tile_y);
  const int tile_channels = 2 * a.pairs;
  const int first_channel = slice * tile_channels;
  const int tile_column = tile_x * a.groups_w * COLUMNS;
  const int tile_row = tile_y * a.groups_h * ROWS;

  const int count = min(tile_channels, a.channels - first_channel);
  const int first_row = tile_row * S - rows.padding;
  const int first_column = tile_column * S - columns.padding;
  const auto* weight =
      static_cast<const T*>(a.weight) + static_cast<int64_t>(first_channel) * K * K;
#if DWSWAP_BULK_COPIES
  __shared__ uint64_t barrier;
  if (a.reader.bulk) {
    if (threadIdx.x == 0) {
      const auto tap_bytes = static_cast<uint32_t>(count * K * K * sizeof(T));
      barrier_init(&barrier);
      barrier_expect(&barrier, a.box_bytes + tap_bytes);
      copy_box(tile, &map, &barrier, first_channel, columns.first_in + first_column * columns.step,
               rows.first_in + first_row * rows.step, n);
      copy_bytes(tile_taps, weight, tap_bytes, &barrier);
    }
    __syncthreads();
  }
#else
  if (a.reader.bulk) __trap();  // the host chose it for an image of sm_90
#endif
  if (!a.reader.bulk) {
    const T* image =
        static_cast<const T*>(a.input) + static_cast<int64_t>(n) * a.in_h * a.in_w * a.channels;
    const auto read = [&](auto bytes) {
      constexpr int VEC = bytes.value / sizeof(T);
      read_tile<T, VEC>(tile, a, lattice, image, first_channel, first_row, first_column);
    };
    for_vector_bytes<T>(a.reader.vector_bytes, read);
    for (int i = threadIdx.x; i < count * K * K; i += blockDim.x) tile_taps[i] = weight[i];
  }

  const uint32_t group_h = a.by_groups_w.divide(a.by_pairs.divide(threadIdx.x, &pair), &group_w);
  const int c = first_channel + 2 * pair;
  const int ow = tile_column + group_w * COLUMNS;
  const int oh = tile_row + group_h * ROWS;
  const bool idle = group_h >= a.groups_h || c >= a.channels || ow >= columns.out || oh >= rows.out;
  float bias[2] = {};
  if (!idle && a.bias != nullptr) load(static_cast<const T*>(a.bias) + c, bias);

#if DWSWAP_BULK_COPIES
  if (a.reader.bulk) barrier_wait(&barrier, 0);
#endif
  if (!a.reader.bulk) {
    wait_for_copies();
    __syncthreads();
  }
  if (Traits::kInPlace && a.transforms_input) {
    const auto transform = [&](auto bytes) {
      constexpr int VEC = bytes.value / sizeof(T);
      transform_tile<Traits::kForm, T, VEC>(tile, a, lattice, first_channel, first_row,
                                            first_column);
    };
    for_vector_bytes<T>(a.reader.vector_bytes, transform);
    __syncthreads();
  }
  if (idle) return;

  constexpr Form IN_LOADS = Traits::kInLoads ? Traits::kForm : Form::kPlain;
  float taps[2][K * K];
  // What has an activation in its loads is no gradient.
  load_taps(tile_taps + 2 * pair * (K * K), taps, IN_LOADS == Form::kPlain && a.reversed_taps);
  float input_bias[2] = {};
  if (IN_LOADS != Form::kPlain && a.input_bias != nullptr)
    load(static_cast<const T*>(a.input_bias) + c, input_bias);
  const InputForm<IN_LOADS, T, 2> input_form(input_bias, a.input_activation);
  const OutputForm<Traits::kForm, T, 2> output_form(a.activation);
  const int iw = ow * S - columns.padding, ih = oh * S - rows.padding;
  const uint32_t inside =
      columns_inside<IN_COLUMNS>(iw, columns.in, (min(COLUMNS, columns.out - ow) - 1) * S + K);

  float sums[ROWS][2 * COLUMNS];
  const float start[2] = {input_form.start(0, bias[0], taps[0]),
                          input_form.start(1, bias[1], taps[1])};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int j = 0; j < 2 * COLUMNS; ++j) sums[r][j] = start[j % 2];
  }
  const auto convolve = [&](auto masked) {
    const T* source =
        tile + (group_h * ROWS * S * a.tile_w + group_w * COLUMNS * S) * tile_channels + 2 * pair;
#pragma unroll
    for (int i = 0; i < IN_ROWS; ++i, source += a.tile_w * tile_channels) {
      const bool row_inside = static_cast<unsigned>(ih + i) < static_cast<unsigned>(rows.in);
      float x[2 * IN_COLUMNS];
      input_form.template apply<IN_COLUMNS, decltype(masked)::value>(
          [&](int pixel) { return load_words<2>(source + pixel * tile_channels); },
          row_inside ? inside : 0, a.input_activation, x);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int kh = i - r * S;
        if (kh < 0 || kh >= K) continue;
#pragma unroll
        for (int kw = 0; kw < K; ++kw) {
#pragma unroll
          for (int j = 0; j < 2 * COLUMNS; ++j) {
            sums[r][j] += x[2 * (j / 2 * S + kw) + j % 2] * taps[j % 2][kh * K + kw];
          }
        }
      }
    }
  };
  if constexpr (IN_LOADS == Form::kPlain) {
    convolve(std::false_type());
  } else {
    const bool whole = inside == (1u << IN_COLUMNS) - 1 && ih >= 0 && ih + IN_ROWS <= rows.in;
    if (__any_sync(__activemask(), !whole)) {
      convolve(std::true_type());
    } else {
      convolve(std::false_type());
    }
  }
  // Else the multiply-adds of the lower rows sink below the branches around their stores, and all
  // of the input waits in registers.
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int j = 0; j < 2 * COLUMNS; ++j) asm volatile("" : "+f"(sums[r][j]));
  }

  const int64_t out_row = static_cast<int64_t>(a.out_w) * a.channels;
  const int64_t out_pixel = static_cast<int64_t>(columns.step) * a.channels;
  const int row = rows.first_out + oh * rows.step, column = columns.first_out + ow * columns.step;
  T* target = static_cast<T*>(a.output) + (static_cast<int64_t>(n) * a.out_h + row) * out_row +
              static_cast<int64_t>(column) * a.channels + c;
#pragma unroll
  for (int r = 0; r < ROWS; ++r, target += rows.step * out_row) {
    if (oh + r >= rows.out) break;
    if constexpr (Traits::kForm == Form::kAny) activate(sums[r], a.activation);
    T* element = target;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j, element += out_pixel) {
      // Reread, it takes no register.
      if (ow + j < (Traits::kDilated ? columns.out : a.out_w)) {
        float value[2] = {sums[r][2 * j], sums[r][2 * j + 1]};
        store_words<2>(element, output_form.apply(value));
      }
    }
  }
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Reader& reader, int multiprocessors,
                   cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  const DepthwiseConv2dParams lattice = lattice_of(p);
  const Tile tile =
      choose_tile(lattice, reader, Traits::kColumns, Traits::kRows, sizeof(T), multiprocessors);
  const int tile_w = (tile.groups_w * Traits::kColumns - 1) * S + K;
  const int tile_h = (tile.groups_h * Traits::kRows - 1) * S + K;
  const int tile_channels = 2 * tile.pairs;

  CUtensorMap map{};
  const auto dilation_h = static_cast<int>(p.dilation_h);
  const auto dilation_w = static_cast<int>(p.dilation_w);
  Box box{tile_channels, tile_w, tile_h, 1, false, dilation_w, dilation_h};
  // Measured for half precision: 3 % faster for small images, 1 % for large ones.
  if (sizeof(T) == 2) box.promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  if (reader.bulk && !encode_input<T>(&map, p, box)) return cudaErrorInvalidValue;

  const auto slices = static_cast<uint32_t>(ceil_div(p.channels, tile_channels));
  const auto tiles_w =
      static_cast<uint32_t>(ceil_div(lattice.out_w, tile.groups_w * Traits::kColumns));
  const auto tiles_h =
      static_cast<uint32_t>(ceil_div(lattice.out_h, tile.groups_h * Traits::kRows));
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = dilation_h, a.dilation_w = dilation_w;
  a.pairs = tile.pairs, a.groups_w = tile.groups_w, a.groups_h = tile.groups_h;
  a.reader = reader;
  a.tile_w = tile_w, a.tile_pixels = tile_w * tile_h;
  a.box_bytes = static_cast<uint32_t>(tile_channels * tile_w * tile_h * sizeof(T));
  a.tile_bytes = static_cast<uint32_t>(ceil_div(a.box_bytes, 128) * 128);
  a.by_dilation_h = Divisor(static_cast<uint32_t>(dilation_h));
  a.by_dilation_w = Divisor(static_cast<uint32_t>(dilation_w));
  a.by_slices = Divisor(slices), a.by_tiles_w = Divisor(tiles_w), a.by_tiles_h = Divisor(tiles_h);
  a.by_pairs = Divisor(static_cast<uint32_t>(tile.pairs));
  a.by_groups_w = Divisor(static_cast<uint32_t>(tile.groups_w));
  a.by_vectors = Divisor(static_cast<uint32_t>(tile_channels * sizeof(T) / reader.vector_bytes));
  a.by_tile_w = Divisor(static_cast<uint32_t>(tile_w));
  a.transforms_input = p.transforms_input(), a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;

  const auto shared = static_cast<int>(a.tile_bytes + tile_channels * K * K * sizeof(T));
  const auto blocks = static_cast<unsigned>(lattice.batch * slices * tiles_w * tiles_h);
  const auto threads = static_cast<unsigned>(ceil_div(tile.threads(), 32) * 32);
  kernel<Traits><<<blocks, threads, shared, stream>>>(map, a);
  return cudaGetLastError();
}

// Of 3 x 3 taps, channel_columns and channel_direct take what is large, but for float32 with
// stride 1.
constexpr bool has_deep(int kernel, int stride, int element_bytes) {
  return kernel != 3 || (stride == 1 && element_bytes == 4);
}

// The form that a problem's kernel is compiled for. Networks have no activation between their large
// kernels; float32 with stride 2 has no registers left for one in its loads. 5 x 5 with stride 2 in
// several rows spills without the branches of kAny, which keep the rows apart.
constexpr Form compiled_form(Form form, int kernel, int stride, Depth depth, int element_bytes) {
  if (clamps(form) || form == Form::kHardswish) {
    if (kernel == 7 || (stride == 2 && element_bytes == 4)) return Form::kAny;
    return relu_as_clamp(form);
  }
  const bool spills = kernel == 5 && stride == 2 && depth == Depth::kDeep;
  return spills || (kernel == 7 && form == Form::kSilu) ? Form::kAny : form;
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, const Reader& reader, int multiprocessors,
                         cudaStream_t stream) {
  const Depth depth = choose_depth(p, multiprocessors);
  if (p.is_dilated()) {
#define DWSWAP_CASE(K)                                                                      \
  if (p.kernel_h == K)                                                                      \
    return depth == Depth::kDeep ? launch<Traits<T, K, 1, Depth::kDeep, Form::kAny, true>>( \
                                       p, reader, multiprocessors, stream)                  \
                                 : launch<Traits<T, K, 1, Depth::kFlat, Form::kAny, true>>( \
                                       p, reader, multiprocessors, stream);
    DWSWAP_CASE(3)
    DWSWAP_CASE(5)
    DWSWAP_CASE(7)
#undef DWSWAP_CASE
    return cudaErrorInvalidValue;
  }
  const auto run = [&]<int K, int S, Depth DEPTH>() {
    return visit_form(form_of(p), [&]<Form FORM>(std::integral_constant<Form, FORM>) {
      constexpr Form COMPILED = compiled_form(FORM, K, S, DEPTH, sizeof(T));
      return launch<Traits<T, K, S, DEPTH, COMPILED>>(p, reader, multiprocessors, stream);
    });
  };
#define DWSWAP_CASE(K, S)                                                              \
  if (p.kernel_h == K && p.stride_h == S) {                                            \
    if constexpr (has_deep(K, S, sizeof(T))) {                                         \
      if (depth == Depth::kDeep) return run.template operator()<K, S, Depth::kDeep>(); \
    }                                                                                  \
    return run.template operator()<K, S, Depth::kFlat>();                              \
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
  cudaError_t launch_typed<T>(const DepthwiseConv2dParams&, const Reader&, int, cudaStream_t)

}  // namespace channel_tiles
}  // namespace dwswap
