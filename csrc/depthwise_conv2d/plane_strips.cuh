// NCHW, stride 1 and 2, kernel sizes known at compile time. sm_80 and later.
//
// Rows of a plane, and planes of an image, follow each other without gaps: a strip of whole rows of
// one plane, or several whole planes, is one piece of memory. A block reads such a piece by 16-byte
// accesses (single rows of 7 or 14 elements would not be aligned), converts and transforms every
// element once, and keeps it in shared memory as float32: there, lanes that are 7 elements apart
// are in different banks. Its outputs, one piece as well, leave the same way.
//
// One thread computes kColumns x kRows outputs: an input element is loaded once per thread and used
// by every output whose window holds it.
#pragma once

#include <algorithm>

#include "common/async_copy.cuh"
#include "common/depth.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace plane_strips {

constexpr int kMaxThreads = 256;
constexpr int kMaxShared = 72 * 1024;  // three blocks per SM of an H200, one where an SM has 100 KB

template <typename T_, int KH_, int KW_, int STRIDE_, Depth DEPTH_>
struct Traits {
  using T = T_;
  static constexpr int kKernelH = KH_;
  static constexpr int kKernelW = KW_;
  static constexpr int kStride = STRIDE_;
  // An odd number of columns keeps lanes in different shared-memory banks; 7 divides the image
  // widths of most networks.
  static constexpr int kColumns = 7;
  // With stride 2 an output has four inputs in shared memory: fewer rows, or few threads fit an SM.
  static constexpr int kRows = DEPTH_ == Depth::kFlat ? 1
                               : STRIDE_ == 2         ? 2
                               : KH_ * KW_ > 25       ? 4
                                                      : 7;
  static constexpr int kMinBlocks = KH_ * KW_ <= 9 && STRIDE_ == 1 ? 3 : 2;
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + KW_;
  static constexpr int kInputRows = (kRows - 1) * STRIDE_ + KH_;
  // Only so many columns at either end of a thread's row can lie outside the image.
  static constexpr int kMaxPaddingW = KW_ / 2;
};

// How a problem is cut into blocks: whole planes, or a strip of rows of one plane.
struct Strip {
  int planes;
  int groups_h;  // threads of a plane along its rows
  int groups_w;  // and along its columns

  int threads() const { return planes * groups_h * groups_w; }
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int planes, rows;  // of output, per block
  Divisor by_strips, by_chunks, by_groups_w, by_groups_h;
  bool transforms_input;
  Activation input_activation, activation;
};

// tile[m, m + count) = source[0, count), m = misalignment(source). Elements before the piece, back
// to the 16-byte boundary, are read too: the tensor is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void read_piece(float* tile, const T* source, int count) {
  constexpr int N = kVectorBytes / sizeof(T);
  constexpr int BATCH = 4;  // loads in flight per thread
  const int end = misalignment(source) + count;
  const T* const first = source - misalignment(source);
  const int step = blockDim.x * N;
  for (int start = threadIdx.x * N; start < end; start += BATCH * step) {
    Words<T, N> raw[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int at = start + b * step;
      if (at < end) raw[b] = load_clipped<N>(first + at, source + count);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int at = start + b * step;
      if (at < end) {
        float values[N];
        widen_all(raw[b], values);
        store_wide(tile + at, values);
      }
    }
  }
}

// The same with input_activation(source + input_bias); elements [i * plane, (i + 1) * plane) belong
// to channel first_channel + i.
template <typename T>
__device__ __forceinline__ void transform_piece(float* tile, const T* source, int count, int plane,
                                                int first_channel, const Arguments& a) {
  constexpr int N = kVectorBytes / sizeof(T);
  const auto* input_bias = static_cast<const T*>(a.input_bias);
  const int skipped = misalignment(source);
  for (int at = threadIdx.x * N; at < skipped + count; at += blockDim.x * N) {
    const Words<T, N> raw = load_clipped<N>(source - skipped + at, source + count);
    float x[N];
    widen_all(raw, x);
    if (input_bias != nullptr) {
      int channel = first_channel + max(at - skipped, 0) / plane;
      // Elements in front of the piece count down too, to where its first plane begins.
      int left = plane - max(at - skipped, 0) % plane - min(at - skipped, 0);
      float bias = widen(input_bias[channel]);
#pragma unroll
      for (int i = 0; i < N; ++i, --left) {
        if (left == 0 && at - skipped + i < count) {
          bias = widen(input_bias[++channel]);
          left = plane;
        }
        x[i] += bias;
      }
    }
    activate(x, a.input_activation);
    store_wide(tile + at, x);
  }
}

// target[0, count) = activation(source[m, m + count)), m = misalignment(target), rounded to T.
template <typename T>
__device__ __forceinline__ void write_piece(T* target, const float* source, int count,
                                            Activation activation) {
  constexpr int N = kVectorBytes / sizeof(T);
  const int skipped = misalignment(target);
  T* const first = target - skipped;
  const int end = skipped + count;
  for (int at = threadIdx.x * N; at < end; at += blockDim.x * N) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float quad[4];
      load(source + at + i, quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = quad[j];
    }
    activate(values, activation);
    if (at >= skipped && at + N <= end) {
      store(first + at, values);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (at + i >= skipped && at + i < end) first[at + i] = narrow<T>(values[i]);
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kMaxThreads, Traits::kMinBlocks) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW, S = Traits::kStride;
  constexpr int ROWS = Traits::kRows, COLUMNS = Traits::kColumns;
  constexpr int IN_COLUMNS = Traits::kInputColumns, EDGE = Traits::kMaxPaddingW;

  // First the input piece, then, when all have read it, the output piece. One vector in front: a
  // thread reads up to EDGE elements before its first row, and drops them.
  extern __shared__ __align__(16) float shared[];
  float* const tile = shared + kVectorBytes / sizeof(float);

  uint32_t strip, chunk, group_w, group_h;
  const uint32_t n = a.by_chunks.divide(a.by_strips.divide(blockIdx.x, &strip), &chunk);
  const int first_channel = chunk * a.planes;
  const int planes = min(a.planes, a.channels - first_channel);
  const int first_row = strip * a.rows;
  const int rows = min(a.rows, a.out_h - first_row);
  // Several planes make one piece only if it holds every row of theirs, used or not.
  const bool whole = a.planes > 1;
  // A strip that sees nothing but padding reads nothing.
  const int in_first = whole ? 0 : min(max(first_row * S - a.padding_h, 0), a.in_h);
  const int in_end = whole ? a.in_h : min((first_row + rows - 1) * S - a.padding_h + KH, a.in_h);
  const int in_rows = max(in_end - in_first, 0);
  const int64_t plane = static_cast<int64_t>(n) * a.channels + first_channel;

  const T* source = static_cast<const T*>(a.input) + (plane * a.in_h + in_first) * a.in_w;
  const int in_plane = in_rows * a.in_w;
  if (in_plane == 0) {
    // Nothing to read.
  } else if (a.transforms_input) {
    transform_piece(tile, source, planes * in_plane, in_plane, first_channel, a);
  } else {
    read_piece(tile, source, planes * in_plane);
  }

  const int p = a.by_groups_h.divide(a.by_groups_w.divide(threadIdx.x, &group_w), &group_h);
  const bool busy = p < planes && static_cast<int>(group_h) * ROWS < rows;
  T* target = static_cast<T*>(a.output) + (plane * a.out_h + first_row) * a.out_w;
  // Threads without work follow the others, so that all of a warp meets at the barriers.
  const int c = first_channel + min(p, planes - 1);
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * (KH * KW);
  float taps[KH * KW];
#pragma unroll
  for (int i = 0; i < KH * KW; ++i) taps[i] = widen(weight[i]);
  const float bias = a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[c]);
  float sums[ROWS][COLUMNS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) sums[r][j] = bias;
  }
  // The last group is moved left to end with the row, so that no thread reaches further than the
  // padding over an edge of the image. What its neighbour computes too, the neighbour stores.
  const int own = static_cast<int>(group_w) * COLUMNS;
  const int ow = min(own, a.out_w - COLUMNS);

  __syncthreads();
  if (busy) {
    const int iw = ow * S - a.padding_w;
    const int ih = (first_row + static_cast<int>(group_h) * ROWS) * S - a.padding_h;
    const float* row = tile + misalignment(source) + p * in_plane + (ih - in_first) * a.in_w + iw;
#pragma unroll
    for (int i = 0; i < Traits::kInputRows; ++i, row += a.in_w) {
      if (ih + i < in_first || ih + i >= in_end) continue;
      float x[IN_COLUMNS];
#pragma unroll
      for (int j = 0; j < IN_COLUMNS; ++j) x[j] = row[j];
#pragma unroll
      for (int j = 0; j < EDGE; ++j) {
        if (iw + j < 0) x[j] = 0.0f;
        constexpr int LAST = IN_COLUMNS - 1;
        if (iw + LAST - j >= a.in_w) x[LAST - j] = 0.0f;
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int kh = i - r * S;
        if (kh < 0 || kh >= KH) continue;
#pragma unroll
        for (int kw = 0; kw < KW; ++kw) {
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) sums[r][j] += x[j * S + kw] * taps[kh * KW + kw];
        }
      }
    }
  }
  __syncthreads();
  if (busy) {
    float* row =
        tile + misalignment(target) + (p * rows + static_cast<int>(group_h) * ROWS) * a.out_w + ow;
#pragma unroll
    for (int r = 0; r < ROWS; ++r, row += a.out_w) {
      if (static_cast<int>(group_h) * ROWS + r >= rows) break;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if (ow + j >= own) row[j] = sums[r][j];
      }
    }
  }
  __syncthreads();
  write_piece(target, tile, planes * rows * a.out_w, a.activation);
}

// Of a block whose larger piece has so many elements: 4 floats in front, up to 7 before a piece
// that begins within a vector, up to 7 behind one that ends within a vector.
inline int64_t shared_bytes(int64_t elements) {
  return (elements + 24) * static_cast<int64_t>(sizeof(float));
}

// Rows of input per plane that a block with so many planes and rows of output reads.
inline int64_t input_rows(const DepthwiseConv2dParams& p, int64_t planes, int64_t out_rows) {
  return planes > 1 ? p.in_h : std::min((out_rows - 1) * p.stride_h + p.kernel_h, p.in_h);
}

// Whether a block may have so many planes and threads along the rows of each.
bool fits(const DepthwiseConv2dParams& params, int columns, int rows, const Strip& strip);

// The cut for a problem in which one group of rows fits.
Strip choose_strip(const DepthwiseConv2dParams& params, int columns, int rows);
// kFlat where threads of the deep kernel would be too few to fill a GPU.
Depth choose_depth(const DepthwiseConv2dParams& params);

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  using T = typename Traits::T;
  const Strip strip = choose_strip(p, Traits::kColumns, Traits::kRows);
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.planes = strip.planes;
  a.rows = static_cast<int>(std::min<int64_t>(strip.groups_h * Traits::kRows, p.out_h));
  const auto strips = static_cast<uint32_t>(ceil_div(p.out_h, a.rows));
  const auto chunks = static_cast<uint32_t>(ceil_div(p.channels, strip.planes));
  a.by_strips = Divisor(strips), a.by_chunks = Divisor(chunks);
  a.by_groups_w = Divisor(static_cast<uint32_t>(strip.groups_w));
  a.by_groups_h = Divisor(static_cast<uint32_t>(strip.groups_h));
  a.transforms_input = p.transforms_input();
  a.input_activation = p.input_activation, a.activation = p.activation;

  const int64_t in_rows = input_rows(p, strip.planes, a.rows);
  const auto shared =
      static_cast<int>(shared_bytes(strip.planes * std::max(in_rows * p.in_w, a.rows * p.out_w)));
  const auto function = kernel<Traits>;
  if (shared > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
    if (status != cudaSuccess) return status;
  }
  const auto blocks = static_cast<unsigned>(p.batch * chunks * strips);
  const auto threads = static_cast<unsigned>(ceil_div(strip.threads(), 32) * 32);
  function<<<blocks, threads, shared, stream>>>(a);
  return cudaGetLastError();
}

// The compiled sizes: X(kernel_h, kernel_w, stride).
#define DWSWAP_PLANE_STRIPS_SIZES(X) \
  X(3, 3, 1)                         \
  X(3, 3, 2) X(5, 5, 1) X(5, 5, 2) X(7, 7, 1) X(7, 7, 2) X(3, 1, 1) X(1, 3, 1) X(3, 7, 1) X(7, 3, 1)

// Calls visit.operator()<Traits>() for the compiled size of the problem. False: there is none.
template <typename T, typename Visit>
bool visit(const DepthwiseConv2dParams& p, Depth depth, Visit&& visit) {
#define DWSWAP_CASE(KH, KW, S)                                         \
  if (p.kernel_h == KH && p.kernel_w == KW && p.stride_h == S) {       \
    if (depth == Depth::kDeep) {                                       \
      visit.template operator()<Traits<T, KH, KW, S, Depth::kDeep>>(); \
    } else {                                                           \
      visit.template operator()<Traits<T, KH, KW, S, Depth::kFlat>>(); \
    }                                                                  \
    return true;                                                       \
  }
  DWSWAP_PLANE_STRIPS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return false;
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  visit<T>(params, choose_depth(params),
           [&]<typename Traits>() { status = launch<Traits>(params, stream); });
  return status;
}

extern template cudaError_t launch_typed<float>(const DepthwiseConv2dParams&, cudaStream_t);
extern template cudaError_t launch_typed<__half>(const DepthwiseConv2dParams&, cudaStream_t);
extern template cudaError_t launch_typed<__nv_bfloat16>(const DepthwiseConv2dParams&, cudaStream_t);

}  // namespace plane_strips
}  // namespace dwswap
