// NCHW in half precision on the tensor cores, K = 5 with stride 1 and 2, K = 7 (sm_90).
//
// For one channel and one row of taps, 8 neighbouring outputs of a row are a product of the 16
// inputs (24 with stride 2) that they see with a band matrix, whose columns are the taps, each
// shifted by the stride. The rows of the other matrix are 16 walks: the same columns of as many
// images, or of segments of their rows. All of them go down a row at a time, and an input row is
// loaded once and multiplied with the bands of all rows of taps, for the rows of output that are
// being added up. So a row takes K products for 128 outputs, where multiply-adds would take
// K * K * 4 instructions.
//
// Pieces of memory come and go by bulk copies as in plane_strips, one per image. A lane loads pairs
// of elements; where a window begins at an odd element, it is loaded from the one before, and its
// bands are shifted by one. Of odd rows every other window is: there are two copies of the bands.
//
// What lies beside a row in memory takes no part, as the bands of a tile at an edge of the image
// have zeros for it. The zeros of the bands meet inputs outside the window, and 0 * infinity is
// NaN: a block in whose outputs one is found computes its units anew without the tensor cores.
#pragma once

#include "common/integer.h"
#include "common/matrix.cuh"
#include "common/numeric.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/exact.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/pieces.cuh"
#include "depthwise_conv2d/plane_bands_cut.h"
#include "depthwise_conv2d/plane_bands_unit.cuh"

namespace dwswap {
namespace plane_bands {

#if DWSWAP_BULK_COPIES

// Shared memory by address, which takes no addition per access; without branches, which would keep
// a warp waiting several times per row.
__device__ __forceinline__ uint32_t load_shared(uint32_t address, bool wanted, uint32_t other) {
  uint32_t word;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, %3;\n@p ld.shared.b32 %0, [%1];\n}"
      : "=r"(word)
      : "r"(address), "r"(static_cast<int>(wanted)), "r"(other)
      : "memory");
  return word;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.shared.b32 [%0], %1;\n}" ::"r"(address),
      "r"(word), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint16_t half, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.shared.b16 [%0], %1;\n}" ::"r"(address),
      "h"(half), "r"(static_cast<int>(wanted))
      : "memory");
}

// x, of which the compiler does not know how it came about: it would keep, and add to, an address
// of either walk.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Of the band of a row of taps, a lane holds column lane / 4, rows 2 (lane % 4) and the next of
// every part: the taps that output lane / 4 of a tile has for these columns of a window, whose
// first output's first tap is at column `left` of the image. Columns beside the image have none.
// The window of rows 0, 2, 4... begins at `left`, or an element before where odd[0] is 1; that of
// the rows between them by odd[1].
template <typename Traits>
__device__ __forceinline__ void load_bands(
    uint32_t (&bands)[Traits::kCopies][Traits::kKernel][Traits::kParts],
    const int (&odd)[Traits::kCopies], const Arguments& a, int channel, int left) {
  constexpr int K = Traits::kKernel, COPIES = Traits::kCopies;
  const int lane = threadIdx.x % 32;
  const auto* const weight =
      static_cast<const uint16_t*>(a.weight) + static_cast<int64_t>(channel) * K * K;
  // The first column that any copy has, from `left` on, and the tap that the output has for it.
  const int begin = 2 * (lane % 4) - (COPIES == 2 ? 1 : odd[0]);
  const int before = begin - lane / 4 * Traits::kStride;
  const auto load = [&]<bool REVERSED>() {
    const uint16_t* const first = REVERSED ? weight + K * K - 1 - before : weight + before;
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
#pragma unroll
      for (int h = 0; h < K; ++h) {
        uint32_t taps[COPIES + 1];
#pragma unroll
        for (int i = 0; i <= COPIES; ++i) {
          const int at = kTile * part + i;
          taps[i] = 0;
          if (static_cast<unsigned>(before + at) < K &&
              static_cast<unsigned>(left + begin + at) < static_cast<unsigned>(a.in_w))
            taps[i] = first[REVERSED ? -(h * K + at) : h * K + at];
        }
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
          const bool from_first = COPIES == 1 || odd[i] != 0;
          bands[i][h][part] =
              from_first ? taps[0] | taps[1] << 16 : taps[COPIES - 1] | taps[COPIES] << 16;
        }
      }
    }
  };
  if (a.reversed_taps) {
    load.template operator()<true>();
  } else {
    load.template operator()<false>();
  }
}

// Adds one row of input, the i-th of an unrolled loop, to the rows of output that see it. `x` is
// the row's window: part, walk lane / 4 or lane / 4 + 8.
template <typename Traits>
__device__ __forceinline__ void multiply_row(
    float (&sums)[Traits::kRing][4], int i, const uint32_t (&x)[Traits::kParts][2],
    const uint32_t (&bands)[Traits::kKernel][Traits::kParts]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, RING = Traits::kRing;
#pragma unroll
  for (int h = 0; h < K; ++h) {
    if ((i - h + K * S) % S != 0) continue;
    float* const sum = sums[(i - h + RING * S) / S % RING];
    multiply_add<T>(sum, {x[0][0], x[0][1], x[1][0], x[1][1]}, {bands[h][0], bands[h][1]});
    if constexpr (Traits::kParts == 3) multiply_add<T>(sum, {x[2][0], x[2][1]}, bands[h][2]);
  }
}

#endif

template <typename Traits>
__global__ void __launch_bounds__(32 * kMaxWarps, kMinBlocks)
    kernel(const __grid_constant__ Arguments a) {
#if DWSWAP_BULK_COPIES
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  constexpr int RING = Traits::kRing, UNROLL = Traits::kUnroll, PARTS = Traits::kParts;
  constexpr int COPIES = Traits::kCopies, COUNTERS = Traits::kCounters;
  constexpr int ELEMENT = sizeof(T), N = kVectorBytes / ELEMENT;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ uint64_t arrived[kStages];
  const int stage_bytes = a.images * a.in_pitch, buffer_bytes = a.images * a.out_pitch;
  const int first_buffer = 2 * kMargin + kStages * stage_bytes;
  const uint32_t stages = shared_address(shared) + kMargin;
  const uint32_t buffers = shared_address(shared) + first_buffer;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;

  // This block's share of the list: at most one unit more or less than another's.
  const auto block = static_cast<int>(blockIdx.x);
  const int first_unit = block * a.share + min(block, a.longer_shares);
  const int end_unit = first_unit + a.share + (block < a.longer_shares ? 1 : 0);
  const auto count_of = [&](const Unit& unit, int i) {
    return i < unit.images ? unit.planes * unit.in_rows * a.in_w : 0;
  };
  // Thread i copies the pieces of image i.
  const auto fetch = [&](int index, int stage) {
    const int i = threadIdx.x;
    if (i >= a.images || index >= end_unit) return;
    const Unit unit(a, index, K, S);
    const auto* input = static_cast<const T*>(a.input);
    fetch_piece(reinterpret_cast<T*>(shared + kMargin + stage * stage_bytes + i * a.in_pitch),
                input + unit.source(a, i < unit.images ? i : 0), count_of(unit, i),
                input + a.in_elements, &arrived[stage]);
  };
  // What no copy writes may lie beside a row, and be NaN until then.
  const auto clear = [&](int from, int to) {
    for (int at = from + lane * kVectorBytes; at < to; at += 32 * kVectorBytes)
      *reinterpret_cast<uint4*>(shared + at) = uint4{};
  };
  if (warp == 0) {
    clear(0, kMargin);
    // Behind a stage lies the next one, whose copies may arrive later.
    for (int stage = 1; stage <= kStages; ++stage)
      clear(kMargin + stage * stage_bytes, 2 * kMargin + stage * stage_bytes);
  }
  for (int stage = 0; stage < min(kStages, end_unit - first_unit); ++stage) {
    const Unit unit(a, first_unit + stage, K, S);
    for (int i = warp; i < a.images; i += warps) {
      const int slot = kMargin + stage * stage_bytes + i * a.in_pitch;
      const int count = count_of(unit, i);
      const int elements = count == 0 ? 0 : static_cast<int>(unit.source(a, i) % N) + count;
      clear(slot + elements / N * kVectorBytes, slot + a.in_pitch);
    }
  }
  fence_for_bulk_copies();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(&arrived[i], a.images);
  }
  __syncthreads();
  for (int i = 0; i < kStages; ++i) fetch(first_unit + i, i);

  const OutputForm<Traits::kForm, T, 2> form(a.activation);
  const int tiles = static_cast<int>(a.by_tiles.value), tasks = a.planes * tiles;
  const int out_row_bytes = a.out_w * ELEMENT;
  const int in_image = COUNTERS == 1 ? 0 : a.channels * a.in_h * a.in_w % N;  // modulo a vector
  const int out_image = COUNTERS == 1 ? 0 : a.channels * a.out_h * a.out_w % N;
  const bool out_pairs = COPIES == 1 || a.out_w % 2 == 0;  // pairs of outputs are whole words

  uint32_t bands[COPIES][K][PARTS];
  int loaded = -1;      // the bands
  float start[4] = {};  // of the sums: the bias
  uint32_t most = 0;    // of the outputs, or NaN
  uint32_t parity = 0;
  int stage = 0, buffer = 0;
  for (int index = first_unit; index < end_unit; ++index) {
    const Unit unit(a, index, K, S);
    const int in_lead = static_cast<int>(unit.source(a, 0) % N);
    const int out_lead = static_cast<int>(unit.target(a, 0) % N);
    const int top = unit.row * S - a.padding_h - unit.in_first;  // of the first walk, in its piece
    // Rows above the image are passed over where all walks begin with them.
    const int skipped = a.segments == 1 ? max(-top, 0) / S * S : 0;
    const int begin_row = skipped / S - (RING - 1);  // the row of output that is complete first
    const int walk_rows = a.segments == 1 ? unit.rows : a.segment_rows;  // of output
    int steps = (walk_rows - 1) * S + K - skipped;                       // rows of input
    // Rows below the image add nothing: what they would complete is complete before.
    if (S == 1 && a.segments == 1) steps = min(steps, unit.in_rows - top - skipped);
    for (int task = warp; task < tasks; task += warps) {
      uint32_t tile;
      const auto plane = static_cast<int>(a.by_tiles.divide(task, &tile));
      if (plane >= unit.planes) break;
      const int channel = unit.channel + plane;
      const int column = static_cast<int>(tile) * kTile;
      const int left = column * S - a.padding_w;
      const int begin = in_lead + (plane * unit.in_rows + top + skipped) * a.in_w + left;
      int odd[COPIES];
#pragma unroll
      for (int i = 0; i < COPIES; ++i) odd[i] = (begin + i * a.in_w) & 1;
      const bool at_edge = left < 0 || left + (kTile - 1) * S + K > a.in_w;
      const int wanted_bands =
          2 * (channel * (tiles + 1) + (at_edge ? static_cast<int>(tile) : tiles)) + odd[0];
      if (wanted_bands != loaded) {
        loaded = wanted_bands;
        load_bands<Traits>(bands, odd, a, channel, left);
        if (a.bias != nullptr) {
          const float bias = widen(static_cast<const T*>(a.bias)[channel]);
#pragma unroll
          for (int i = 0; i < 4; ++i) start[i] = bias;
          // Else the compiler would keep it once, and copy it to four registers at every row.
          multiply_add<T>(start, {0, 0, 0, 0}, {0, 0});
        }
      }
      barrier_wait(&arrived[stage], parity);
      const Transform<T> transform(a, channel);
      const uint32_t outside = Traits::kForm == Form::kClamp ? transform.outside : 0;
      const int columns = a.out_w - column - lane % 4 * 2;  // of a lane's pair, and behind it
      // Bytes from a window to that of the next row: each begins at an even element.
      int to_next[COPIES];
#pragma unroll
      for (int i = 0; i < COPIES; ++i)
        to_next[i] = (a.in_w + odd[i] - odd[(i + 1) % COPIES]) * ELEMENT;
      // Of walks lane / 4 and lane / 4 + 8: the row of the piece, bytes of shared memory at which
      // the lane's part of the window begins, rows of output, and where the lane's pair goes.
      int row[COUNTERS], rows[COUNTERS];
      uint32_t in_at[COUNTERS], out_at[COUNTERS];
#pragma unroll
      for (int i = 0; i < COUNTERS; ++i) {
        uint32_t segment;
        const auto image = static_cast<int>(a.by_segments.divide(lane / 4 + 8 * i, &segment));
        const int first = static_cast<int>(segment) * a.segment_rows;
        // Absent images are computed too, and nothing of them is copied.
        rows[i] = columns > 0 ? max(min(a.segment_rows, unit.rows - first), 0) : 0;
        row[i] = top + skipped + first * S;
        // Of another image, the piece may begin elsewhere in a vector.
        in_at[i] =
            stages + stage * stage_bytes + image * a.in_pitch + lane % 4 * 4 +
            ((in_lead + image * in_image) % N - in_lead + begin + first * S * a.in_w - odd[0]) *
                ELEMENT;
        out_at[i] = buffers + buffer * buffer_bytes + image * a.out_pitch +
                    ((out_lead + image * out_image) % N +
                     (plane * unit.rows + first + begin_row) * a.out_w + column + lane % 4 * 2) *
                        ELEMENT;
      }

      float sums[RING][4];
#pragma unroll
      for (int i = 0; i < RING * 4; ++i) sums[i / 4][i % 4] = start[i % 4];
      // The row to come is loaded while one is multiplied.
      uint32_t next[PARTS][2];
      bool within[COUNTERS];
      const auto load_row = [&] {
#pragma unroll
        for (int i = 0; i < COUNTERS; ++i)
          within[i] = static_cast<unsigned>(row[i]) < static_cast<unsigned>(unit.in_rows);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
#pragma unroll
          for (int part = 0; part < PARTS; ++part) {
            const uint32_t at = in_at[w % COUNTERS] + w / COUNTERS * a.in_apart;
            next[part][w] = load_shared(at + part * kTile * ELEMENT, within[w % COUNTERS], outside);
          }
        }
      };
      load_row();
      int done = begin_row;  // the row of output that is complete next
      const auto finish_row = [&](float (&sum)[4]) {
        uint32_t pairs[2];
        bool wanted[COUNTERS];
#pragma unroll
        for (int w = 0; w < COUNTERS; ++w)
          wanted[w] = static_cast<unsigned>(done) < static_cast<unsigned>(rows[w]);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          float pair[2] = {sum[2 * w], sum[2 * w + 1]};
          pairs[w] = form.apply(pair).data[0];
          most = maximum_word<T>(most, pairs[w]);
          sum[2 * w] = start[2 * w], sum[2 * w + 1] = start[2 * w + 1];
        }
        ++done;
        uint32_t at[2];
#pragma unroll
        for (int w = 0; w < 2; ++w) at[w] = out_at[w % COUNTERS] + w / COUNTERS * a.out_apart;
        if (out_pairs) {
#pragma unroll
          for (int w = 0; w < 2; ++w) store_shared(at[w], pairs[w], wanted[w % COUNTERS]);
        } else {
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            store_shared(at[w], static_cast<uint16_t>(pairs[w]), wanted[w % COUNTERS]);
            store_shared(at[w] + ELEMENT, static_cast<uint16_t>(pairs[w] >> 16),
                         wanted[w % COUNTERS] && columns > 1);
          }
        }
#pragma unroll
        for (int w = 0; w < COUNTERS; ++w) out_at[w] = opaque(out_at[w] + out_row_bytes);
      };
      for (int step = 0; step < steps; step += UNROLL) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
          // At every row it would cost more than the rows that it saves.
          if (i == RING && step + i >= steps) break;
          uint32_t x[PARTS][2];
#pragma unroll
          for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int w = 0; w < 2; ++w) {
              x[part][w] = next[part][w];
              if constexpr (Traits::kForm == Form::kClamp) x[part][w] = transform(x[part][w]);
            }
          }
#pragma unroll
          for (int w = 0; w < COUNTERS; ++w)
            ++row[w], in_at[w] = opaque(in_at[w] + to_next[i % COPIES]);
          load_row();
          multiply_row<Traits>(sums, i, x, bands[i % COPIES]);
          if ((i + 1 - K + K * S) % S != 0) continue;
          finish_row(sums[(i + 1 - K + RING * S) / S % RING]);
        }
      }
      if constexpr (S == 1) {
#pragma unroll
        for (int i = 0; i < K / 2; ++i) {
          if (done >= walk_rows) break;
          finish_row(sums[(i + 1) % RING]);
        }
      }
    }

    fence_for_bulk_copies();
    if (threadIdx.x < kWalks) wait_for_bulk_reads();  // of the other buffer
    __syncthreads();
    fetch(index + kStages, stage);
    const int count = unit.planes * unit.rows * a.out_w;
    T* const output = static_cast<T*>(a.output);
    unsigned char* const results = shared + first_buffer + buffer * buffer_bytes;
    if (out_lead == 0 && out_image == 0 && count % N == 0) {
      if (threadIdx.x < unit.images)
        write_bytes(output + unit.target(a, threadIdx.x), results + threadIdx.x * a.out_pitch,
                    count * ELEMENT);
    } else {
      for (int i = warp; i < unit.images; i += warps) {
        write_piece_by_warp(output + unit.target(a, i),
                            reinterpret_cast<const T*>(results + i * a.out_pitch), count);
      }
    }
    buffer ^= 1;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  if (threadIdx.x < kWalks) wait_for_bulk_writes();
  if (__syncthreads_or(has_nan<T>(most))) recompute<Traits>(a, first_unit, end_unit);
#else
  __trap();  // the host chose it for an image of sm_90
#endif
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                   cudaStream_t stream) {
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.in_elements = p.batch * p.channels * p.in_h * p.in_w;
  a.batch = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = cut.images, a.segments = cut.segments, a.planes = cut.planes, a.rows = cut.rows;
  a.segment_rows = cut.segment_rows;
  a.in_pitch = cut.in_pitch, a.out_pitch = cut.out_pitch;
  a.in_apart = kWalks / 2 / cut.segments * cut.in_pitch;
  a.out_apart = kWalks / 2 / cut.segments * cut.out_pitch;
  const auto strips = static_cast<uint32_t>(ceil_div(p.out_h, cut.rows));
  const auto groups = static_cast<uint32_t>(ceil_div(p.batch, cut.images));
  const auto units = static_cast<int>(strips * groups * ceil_div(p.channels, cut.planes));
  a.by_strips = Divisor(strips), a.by_groups = Divisor(groups);
  a.by_tiles = Divisor(static_cast<uint32_t>(ceil_div(p.out_w, kTile)));
  a.by_segments = Divisor(static_cast<uint32_t>(cut.segments));
  a.transforms_input = p.transforms_input(), a.reversed_taps = p.reversed_taps;
  a.input_activation = p.input_activation, a.activation = p.activation;

  const auto function = kernel<Traits>;
  const int shared = cut.shared_bytes(), threads = 32 * cut.warps;
  cudaError_t status = allow_shared_memory(function, device, kStaticBytes);
  if (status != cudaSuccess) return status;
  int resident = 0;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, threads, shared);
  if (status != cudaSuccess) return status;
  const int blocks = std::min(units, device.multiprocessors * std::max(resident, 1));
  a.share = units / blocks, a.longer_shares = units % blocks;
  function<<<blocks, threads, shared, stream>>>(a);
  return cudaGetLastError();
}

inline bool has_even_rows(const DepthwiseConv2dParams& p) {
  return p.in_w % 2 == 0 && p.out_w % 2 == 0;
}

// Images begin at vectors, and both walks of a lane are in the same segment.
inline bool shares_counters(const DepthwiseConv2dParams& p, const Cut& cut) {
  constexpr int64_t kVectorElements = kVectorBytes / 2;
  return p.channels * p.in_h * p.in_w % kVectorElements == 0 &&
         p.channels * p.out_h * p.out_w % kVectorElements == 0 && cut.segments <= kWalks / 2;
}

template <typename T, int K, int S, Form FORM>
cudaError_t launch_form(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                        cudaStream_t stream) {
  if (!shares_counters(p, cut)) return launch<Traits<T, K, S, FORM, 2, 2>>(p, cut, device, stream);
  return has_even_rows(p) ? launch<Traits<T, K, S, FORM, 1, 1>>(p, cut, device, stream)
                          : launch<Traits<T, K, S, FORM, 2, 1>>(p, cut, device, stream);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, const Device& device,
                         cudaStream_t stream) {
  const Cut cut = choose_cut(p, device);
  if (cut.rows == 0) return cudaErrorInvalidValue;
  const bool plain = form_of(p) == Form::kPlain;
#define DWSWAP_CASE(K, S)                                                      \
  if (p.kernel_h == K && p.stride_h == S) {                                    \
    return plain ? launch_form<T, K, S, Form::kPlain>(p, cut, device, stream)  \
                 : launch_form<T, K, S, Form::kClamp>(p, cut, device, stream); \
  }
  DWSWAP_PLANE_BANDS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const DepthwiseConv2dParams&, const Device&, cudaStream_t)

}  // namespace plane_bands
}  // namespace dwswap
