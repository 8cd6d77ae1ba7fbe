// NCHW, stride 1 and 2, kernel sizes known at compile time. sm_80 and later.
//
// Rows of a plane, and planes of an image, follow each other without gaps: a strip of whole rows of
// one plane, or several whole planes, is one piece of memory. A block works through a list of such
// pieces. Those to come are on their way into a ring of stages in shared memory, by bulk copies on
// sm_90 and by asynchronous copies of 16 bytes elsewhere: rows of 7 or 14 elements are not aligned,
// but a piece is, once it is rounded outwards. Its outputs, one piece as well, leave the same way.
//
// A thread owns some neighbouring columns and reads each of their rows once, for every output whose
// window holds it. What lies beside the image is masked.
#pragma once

#include <algorithm>

#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/pieces.cuh"
#include "depthwise_conv2d/plane_strips_walk.cuh"

namespace dwswap {
namespace plane_strips {

// A unit: where it lies, and the rows of input that it sees.
struct Unit {
  int chunk;  // of channels
  int n, first_channel, planes;
  int first_row, rows;  // of output
  int in_first, in_rows;

  __device__ __forceinline__ Unit(const Arguments& a, int index, int kernel_h, int kernel_w,
                                  int stride) {
    uint32_t strip, inner;
    const auto outer =
        static_cast<int>(a.by_inner.divide(a.by_strips.divide(index, &strip), &inner));
    const bool by_chunks = kernel_h * kernel_w > kFewTaps || a.order == Order::kChunks;
    chunk = by_chunks ? outer : static_cast<int>(inner);
    n = by_chunks ? static_cast<int>(inner) : outer;
    first_channel = chunk * a.planes;
    planes = min(a.planes, a.channels - first_channel);
    first_row = strip * a.rows;
    rows = min(a.rows, a.out_h - first_row);
    // Several planes make one piece only if it holds every row of theirs, used or not.
    const bool whole = a.planes > 1;
    const int top = first_row * stride - a.padding_h;
    in_first = whole ? 0 : min(max(top, 0), a.in_h);
    const int in_end = whole ? a.in_h : min(top + (rows - 1) * stride + kernel_h, a.in_h);
    in_rows = max(in_end - in_first, 0);  // a strip that sees nothing but padding reads nothing
  }

  template <typename T>
  __device__ __forceinline__ const T* source(const Arguments& a) const {
    return static_cast<const T*>(a.input) + static_cast<int64_t>(n) * a.in_image +
           (first_channel * a.in_h + in_first) * a.in_w;
  }
  template <typename T>
  __device__ __forceinline__ T* target(const Arguments& a) const {
    return static_cast<T*>(a.output) + static_cast<int64_t>(n) * a.out_image +
           (first_channel * a.out_h + first_row) * a.out_w;
  }
};

// Starts the copy of a unit's piece as fetch_piece() does: by the copy engine, or by all threads.
template <typename T>
__device__ __forceinline__ void fetch(T* stage, const T* source, int count, uint64_t* barrier,
                                      const Arguments& a) {
  constexpr int N = kVectorBytes / sizeof(T);
  const T* const end = static_cast<const T*>(a.end);
#if DWSWAP_BULK_COPIES
  if (a.bulk) {
    if (threadIdx.x == 0) fetch_piece(stage, source, count, end, barrier);
    return;
  }
#endif
  const T* const first = source - misalignment(source);
  const int elements = count == 0 ? 0 : misalignment(source) + count;
  for (int at = threadIdx.x * N; at < elements; at += blockDim.x * N) {
    if (end == nullptr || first + at + N <= end) {
      copy_async<kVectorBytes>(stage + at, first + at, kVectorBytes);
    } else {
      for (int i = at; i < elements; ++i) stage[i] = first[i];
    }
  }
  commit_copies();
}

// input_activation(input + input_bias) of a plane's part of a piece, in place, by `threads`
// threads; the result is rounded to T as it would be in a tensor. A word at a time: the elements in
// front of the first one and behind the last are single.
template <typename T>
__device__ __forceinline__ void transform_plane(T* plane, int elements, int thread, int threads,
                                                float input_bias, const Arguments& a) {
  constexpr int N = 4 / sizeof(T), WORDS = 4;
  const auto transform = [&](auto& x) {
#pragma unroll
    for (float& value : x) value += input_bias;
    activate(x, a.input_activation);
  };
  const auto transform_single = [&](T* at) {
    float x[1] = {widen(*at)};
    transform(x);
    *at = narrow<T>(x[0]);
  };
  const auto misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(plane) % 4 / sizeof(T));
  const int head = N == 1 ? 0 : misaligned;
  const int words = (elements - head) / N;
  if (head != 0 && thread == 0) transform_single(plane);
  if (head + words * N < elements && thread == threads - 1) transform_single(plane + elements - 1);
  T* const first = plane + head;
  for (int i = thread; i < words; i += WORDS * threads) {
    float x[WORDS * N] = {};
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      if (i + w * threads >= words) continue;
      float value[N];
      load(first + (i + w * threads) * N, value);
#pragma unroll
      for (int e = 0; e < N; ++e) x[w * N + e] = value[e];
    }
    transform(x);
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      if (i + w * threads >= words) continue;
      float value[N];
#pragma unroll
      for (int e = 0; e < N; ++e) value[e] = x[w * N + e];
      store(first + (i + w * threads) * N, value);
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW, S = Traits::kStride;
  constexpr int COLUMNS = Traits::kColumns;

  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const buffers = shared + a.stages * a.in_bytes;
  const auto stage_at = [&](int i) {
    return reinterpret_cast<T*>(shared + i * a.in_bytes + kMargin);
  };
  const auto buffer_at = [&](int i) { return reinterpret_cast<T*>(buffers + i * a.out_bytes); };
  __shared__ uint64_t arrived[kMaxStages];
  // A row outside the image for hold(), in which accesses are as aligned as in those inside.
  constexpr int STEP = Traits::kInputTogether, EDGE = Traits::kMaxPaddingW;
  constexpr int ZEROS = Traits::kHolds ? Traits::kInputColumns + STEP : 1;
  __shared__ __align__(kVectorBytes) T row_of_zeros[ZEROS];
  static_assert(sizeof(arrived) + sizeof(row_of_zeros) <= kStaticBytes);
  static_assert(ZEROS <= 32, "a block has a warp at least");
  if (Traits::kHolds && threadIdx.x < ZEROS) row_of_zeros[threadIdx.x] = narrow<T>(0.0f);
  const T* const zeros = row_of_zeros + (STEP - EDGE % STEP) % STEP;

  // This block's share of the list: at most one unit more or less than another's.
  const auto block = static_cast<int>(blockIdx.x);
  const int units = a.share + (block < a.longer_shares ? 1 : 0);
  const bool in_turn = KH * KW <= kFewTaps && a.order == Order::kMemoryInTurn;
  const int first_unit = in_turn ? block : block * a.share + min(block, a.longer_shares);
  const int step = in_turn ? static_cast<int>(gridDim.x) : 1;
  const auto fetch_unit = [&](int i, int stage) {
    const Unit unit(a, first_unit + i * step, KH, KW, S);
    fetch(stage_at(stage), unit.source<T>(a), unit.planes * unit.in_rows * a.in_w, &arrived[stage],
          a);
  };
#if DWSWAP_BULK_COPIES
  if (a.bulk && threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) barrier_init(&arrived[i]);
  }
#else
  if (a.bulk) __trap();  // the host chose it for an image of sm_90
#endif
  for (int i = 0; i < a.stages; ++i) {
    if (i < units) fetch_unit(i, i);
  }
  __syncthreads();

  uint32_t lane, group;
  const int p = a.by_groups.divide(a.by_lanes.divide(threadIdx.x, &lane), &group);
  const int own_row = static_cast<int>(group) * a.group_rows;
  // This thread's columns. The last group is moved left to end with the row, so that no thread
  // reaches further than the padding over an edge of the image; what its neighbour computes too,
  // the neighbour stores.
  int own, ow, iw;
  const auto move_to = [&](int column) {
    own = column;
    ow = min(own, a.out_w - COLUMNS);
    iw = ow * S - a.padding_w;
  };
  const int first_column = static_cast<int>(lane) * COLUMNS;
  const int column_step = static_cast<int>(a.by_lanes.value) * COLUMNS;
  move_to(first_column);

  float taps[KH * KW];
  float bias = 0.0f, input_bias = 0.0f;
  int chunk = -1, stage = 0;
  uint32_t parity = 0;
  for (int i = 0; i < units; ++i) {
    const Unit unit(a, first_unit + i * step, KH, KW, S);
    if (unit.chunk != chunk) {
      chunk = unit.chunk;
      // Threads without work follow the others, so that all meet at the barriers.
      const int c = unit.first_channel + min(p, unit.planes - 1);
      const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * (KH * KW);
#pragma unroll
      for (int i = 0; i < KH * KW; ++i) taps[i] = widen(weight[i]);
      reverse_where(a.reversed_taps, taps);
      if (a.bias != nullptr) bias = widen(static_cast<const T*>(a.bias)[c]);
      if (Traits::kForm != Form::kPlain && a.input_bias != nullptr)
        input_bias = widen(static_cast<const T*>(a.input_bias)[c]);
    }
    const T* const source = unit.source<T>(a);
    T* const target = unit.target<T>(a);
    T* const plane = stage_at(stage) + misalignment(source) + p * unit.in_rows * a.in_w;
    const int buffer = a.buffers == 1 ? 0 : i % 2;
#if DWSWAP_BULK_COPIES
    if (a.bulk) barrier_wait(&arrived[stage], parity);
#endif
    if (!a.bulk) {
      wait_for_groups(min(a.stages, units - i) - 1);
      __syncthreads();
    }
    if (a.buffers == 1 && i > 0) {
#if DWSWAP_BULK_COPIES
      if (a.bulk && threadIdx.x == 0) wait_for_bulk_reads();
#endif
      __syncthreads();
    }
    if (Traits::kForm == Form::kAny && a.transforms_input) {
      if (p < unit.planes) {
        const auto lanes = static_cast<int>(a.by_lanes.value);
        transform_plane(plane, unit.in_rows * a.in_w,
                        static_cast<int>(group) * lanes + static_cast<int>(lane),
                        lanes * static_cast<int>(a.by_groups.value), input_bias, a);
      }
      __syncthreads();
    }

    const int rows = min(a.group_rows, unit.rows - own_row);
    while (p < unit.planes && rows > 0 && own < a.out_w) {
      Walk<T> w;
      w.rows = rows, w.in_rows = unit.in_rows;
      w.ih = (unit.first_row + own_row) * S - a.padding_h - unit.in_first, w.iw = iw;
      w.row = plane + w.ih * a.in_w + iw;
      w.out = buffer_at(buffer) + misalignment(target) + (p * unit.rows + own_row) * a.out_w + ow;
      w.skipped = own - ow;
      if constexpr (Traits::kHolds) {
        hold<Traits>(w, taps, bias, input_bias, zeros, a);
      } else {
        walk<Traits>(w, taps, bias, input_bias, a);
      }
      if (column_step >= a.out_w) break;  // all columns at once, as a rule
      move_to(own + column_step);
    }
    if (own != first_column) move_to(first_column);
    const int count = unit.planes * unit.rows * a.out_w;
#if DWSWAP_BULK_COPIES
    if (a.bulk) {
      fence_for_bulk_copies();
      // The other buffer is free from here on.
      if (a.buffers > 1 && threadIdx.x == 0) wait_for_bulk_reads();
    }
#endif
    __syncthreads();
    if (i + a.stages < units) fetch_unit(i + a.stages, stage);
#if DWSWAP_BULK_COPIES
    if (a.bulk && misalignment(target) == 0 && count * sizeof(T) % kVectorBytes == 0) {
      if (threadIdx.x == 0) write_bytes(target, buffer_at(buffer), count * sizeof(T));
    } else
#endif
    {
      write_piece(target, buffer_at(buffer), count);
    }
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
#if DWSWAP_BULK_COPIES
  if (a.bulk && threadIdx.x == 0) wait_for_bulk_reads();
#endif
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device, bool bulk,
                   cudaStream_t stream) {
  using T = typename Traits::T;
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.in_image = static_cast<int>(p.channels * p.in_h * p.in_w);
  a.out_image = static_cast<int>(p.channels * p.out_h * p.out_w);
  const int64_t in_elements = p.batch * a.in_image;
  if (in_elements % (kVectorBytes / sizeof(T)) != 0)
    a.end = static_cast<const T*>(p.input) + in_elements;
  a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.planes = cut.planes, a.rows = cut.rows;
  a.stages = cut.stages, a.buffers = cut.buffers;
  a.group_rows = ceil_div(cut.rows, cut.groups);
  const auto strips = static_cast<uint32_t>(ceil_div(p.out_h, cut.rows));
  const auto chunks = static_cast<uint32_t>(ceil_div(p.channels, cut.planes));
  const auto images = static_cast<uint32_t>(p.batch);
  const auto units = static_cast<int>(chunks * images * strips);
  a.order = order_of(p, cut);
  a.in_bytes = static_cast<int>(cut.stage_bytes());
  a.out_bytes = static_cast<int>(cut.buffer_bytes());
  a.by_strips = Divisor(strips);
  a.by_inner = Divisor(a.order == Order::kChunks ? images : chunks);
  a.by_lanes = Divisor(static_cast<uint32_t>(cut.lanes));
  a.by_groups = Divisor(static_cast<uint32_t>(cut.groups));
  a.bulk = bulk;
  a.ragged = p.out_w % Traits::kColumns != 0;
  a.transforms_input = p.transforms_input(), a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;

  const auto function = kernel<Traits>;
  const auto threads = static_cast<int>(ceil_div(cut.threads(), 32) * 32);
  const auto shared = static_cast<int>(cut.shared_bytes());
  cudaError_t status = cudaSuccess;
  if (shared + kStaticBytes > 48 * 1024) {
    status = allow_shared_memory(function, device, kStaticBytes);
    if (status != cudaSuccess) return status;
  }
  int resident = 0;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, threads, shared);
  if (status != cudaSuccess) return status;
  const int blocks = std::min(units, device.multiprocessors * std::max(resident, 1));
  a.share = units / blocks, a.longer_shares = units % blocks;
  function<<<blocks, threads, shared, stream>>>(a);
  return cudaGetLastError();
}

// The kernel of as many columns as the cut's, one of COLUMNS. One for every form: what is not at
// the beginning of a kernel's code is fetched while it runs (benchmarks/NOTES.md).
template <typename T, int KH, int KW, int S, int... COLUMNS>
cudaError_t launch_columns(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                           bool bulk, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  const auto launch_as = [&]<int N, Rows ROWS>() {
    status = visit_form(form_of(p), [&]<Form FORM>(std::integral_constant<Form, FORM>) {
      constexpr Form COMPILED = compiled_form(FORM, KH, KW, N);
      if constexpr (has_holding(KH, KW, S, N, ROWS, COMPILED, sizeof(T))) {
        if (cut.holds)
          return launch<Traits<T, KH, KW, S, N, ROWS, true, COMPILED>>(p, cut, device, bulk,
                                                                       stream);
      }
      return launch<Traits<T, KH, KW, S, N, ROWS, false, COMPILED>>(p, cut, device, bulk, stream);
    });
  };
  const auto launch_if = [&]<int N>() {
    if (cut.columns != N) return;
    const Rows rows = rows_of(N, cut.holds, p, sizeof(T));
    if constexpr (has_whole_rows(KH, KW, S, N)) {
      if (rows == Rows::kWhole) return launch_as.template operator()<N, Rows::kWhole>();
    }
    if constexpr (has_even_rows(KH, KW, S, N, sizeof(T))) {
      if (rows == Rows::kEven) return launch_as.template operator()<N, Rows::kEven>();
    }
    if constexpr (N != kWholeColumns) launch_as.template operator()<N, Rows::kAny>();
  };
  (launch_if.template operator()<COLUMNS>(), ...);
  return status;
}

template <typename T, Threads THREADS, bool MANY_TAPS>
cudaError_t launch_cut(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                       bool bulk, cudaStream_t stream) {
  const auto launch_size = [&]<int KH, int KW, int S>() {
    if constexpr (THREADS == Threads::kNarrow) {
      return launch_columns<T, KH, KW, S, 1>(p, cut, device, bulk, stream);
    } else if constexpr (THREADS == Threads::kWide) {
      return launch_columns<T, KH, KW, S, kWideColumns>(p, cut, device, bulk, stream);
    } else if constexpr (has_pairs(KH, KW, S)) {
      return launch_columns<T, KH, KW, S, DWSWAP_PLANE_STRIPS_PAIRED_COLUMNS>(p, cut, device, bulk,
                                                                              stream);
    } else {
      return cudaErrorInvalidValue;
    }
  };
#define DWSWAP_CASE(KH, KW, S)                                   \
  if constexpr (has_many_taps(KH, KW) == MANY_TAPS) {            \
    if (p.kernel_h == KH && p.kernel_w == KW && p.stride_h == S) \
      return launch_size.template operator()<KH, KW, S>();       \
  }
  DWSWAP_PLANE_STRIPS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_CUT(T, THREADS, MANY_TAPS)                                                   \
  cudaError_t launch_cut<T, Threads::THREADS, MANY_TAPS>(const DepthwiseConv2dParams&, const Cut&, \
                                                         const Device&, bool, cudaStream_t)

}  // namespace plane_strips
}  // namespace dwswap
