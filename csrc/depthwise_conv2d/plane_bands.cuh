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
// of elements; where a row begins at an odd element, its window begins an element earlier, and its
// bands are shifted by one. Every other row may: there are two copies of the bands.
//
// The zeros of the bands meet inputs outside the window, and 0 * infinity is NaN: a block in whose
// outputs one is found computes its units anew without the tensor cores.
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

namespace dwswap {
namespace plane_bands {

template <typename T_, int K_, int STRIDE_, Form FORM_>
struct Traits {
  using T = T_;
  static constexpr Form kForm = FORM_;  // kPlain or kClamp
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kRing = ring_rows(K_, STRIDE_);
  // Rows of input: their places in the ring and their copy of the bands are known.
  static constexpr int kUnroll = 2 * kRing;
  static constexpr int kParts = window_parts(STRIDE_);
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int64_t in_elements;  // of the whole input
  int batch, channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int images, segments, planes, rows, segment_rows;
  int share, longer_shares;  // units of a block, and blocks that have one more
  int in_pitch, out_pitch;   // bytes
  Divisor by_strips, by_groups, by_tiles, by_segments;
  bool transforms_input, reversed_taps;
  Activation input_activation, activation;
};

// A unit: where it lies, and the rows of input that it sees.
struct Unit {
  int channel, planes, image, images;  // the first ones, and how many
  int row, rows;                       // of output, of a plane
  int in_first, in_rows;

  __device__ __forceinline__ Unit(const Arguments& a, int index, int kernel, int stride) {
    uint32_t strip, group;
    const uint32_t chunk = a.by_groups.divide(a.by_strips.divide(index, &strip), &group);
    channel = static_cast<int>(chunk) * a.planes;
    planes = min(a.planes, a.channels - channel);
    image = static_cast<int>(group) * a.images;
    images = min(a.images, a.batch - image);
    row = static_cast<int>(strip) * a.rows;
    rows = min(a.rows, a.out_h - row);
    const bool whole = a.rows == a.out_h;
    const int top = row * stride - a.padding_h;
    in_first = whole ? 0 : min(max(top, 0), a.in_h);
    const int in_end = whole ? a.in_h : min(top + (rows - 1) * stride + kernel, a.in_h);
    in_rows = max(in_end - in_first, 0);
  }

  // Elements in front of the piece of image i.
  __device__ __forceinline__ int64_t source(const Arguments& a, int i) const {
    return ((static_cast<int64_t>(image + i) * a.channels + channel) * a.in_h + in_first) * a.in_w;
  }
  __device__ __forceinline__ int64_t target(const Arguments& a, int i) const {
    return ((static_cast<int64_t>(image + i) * a.channels + channel) * a.out_h + row) * a.out_w;
  }
};

// input_activation(x + input_bias) of two elements, rounded as it would be in a tensor.
template <typename T>
struct Transform {
  uint32_t input_bias, low, high;

  __device__ __forceinline__ Transform(const Arguments& a, int channel) {
    const float b =
        a.input_bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.input_bias)[channel]);
    const float l = low_of(a.input_activation), h = high_of(a.input_activation);
    input_bias = narrow_pair<T>(b, b), low = narrow_pair<T>(l, l), high = narrow_pair<T>(h, h);
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const {
    return minimum_word<T>(maximum_word<T>(sum_word<T>(x, input_bias), low), high);
  }
};

// Computes a block's units without the tensor cores.
template <typename Traits>
__device__ __noinline__ void recompute(const Arguments& a, int first_unit, int end_unit) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  for (int index = first_unit; index < end_unit; ++index) {
    const Unit u(a, index, K, S);
    const int plane = u.rows * a.out_w, image = u.planes * plane;
    for (int i = threadIdx.x; i < u.images * image; i += blockDim.x) {
      const int n = i / image, p = i % image / plane, at = i % plane;
      const int c = u.channel + p, y = u.row + at / a.out_w, x = at % a.out_w;
      const auto* first = static_cast<const T*>(a.input) +
                          (static_cast<int64_t>(u.image + n) * a.channels + c) * a.in_h * a.in_w;
      const auto* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * K * K;
      const Transform<T> transform(a, c);
      const auto multiply = [&](T element, int tap) {
        const auto bits = *reinterpret_cast<const uint16_t*>(&element);
        const float value = widen_pair<T>(a.transforms_input ? transform(bits) : bits).x;
        return value * widen(weight[a.reversed_taps ? K * K - 1 - tap : tap]);
      };
      const Channel<T> channel{first, a.in_w, 1, a.in_h, a.in_w};
      const float bias = a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[c]);
      const float sum =
          bias + sum_window<K>(channel, y * S - a.padding_h, x * S - a.padding_w, multiply);
      static_cast<T*>(a.output)[u.target(a, n) + p * a.out_h * a.out_w + at] =
          narrow<T>(clamp(sum, low_of(a.activation), high_of(a.activation)));
    }
  }
}

#if DWSWAP_BULK_COPIES

// Shared memory by address, which takes no addition per access; without branches, which would keep
// a warp waiting several times per row.
__device__ __forceinline__ uint32_t load_shared(uint32_t address, bool wanted) {
  uint32_t word;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.shared.b32 %0, [%1];\n}"
      : "=r"(word)
      : "r"(address), "r"(static_cast<int>(wanted))
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

// Of the band of a row of taps, a lane holds column lane / 4, rows 2 (lane % 4) and the next of
// every part: the taps that output lane / 4 of a tile has for these columns of a window. The window
// of rows 0, 2, 4... begins at an output's first tap, or an element before where odd[0] is 1; that
// of the rows between them by odd[1].
template <typename Traits>
__device__ __forceinline__ void load_bands(uint32_t (&bands)[2][Traits::kKernel][Traits::kParts],
                                           const int (&odd)[2], const Arguments& a, int channel) {
  constexpr int K = Traits::kKernel;
  const int lane = threadIdx.x % 32;
  const auto* const weight =
      static_cast<const uint16_t*>(a.weight) + static_cast<int64_t>(channel) * K * K;
  // The tap that an output has for the column before a lane's first one.
  const int before = 2 * (lane % 4) - lane / 4 * Traits::kStride - 1;
  const auto load = [&]<bool REVERSED>() {
    const uint16_t* const first = REVERSED ? weight + K * K - 1 - before : weight + before;
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
#pragma unroll
      for (int h = 0; h < K; ++h) {
        uint32_t taps[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const int at = kTile * part + i;
          taps[i] = 0;
          if (static_cast<unsigned>(before + at) < K)
            taps[i] = first[REVERSED ? -(h * K + at) : h * K + at];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
          bands[i][h][part] = odd[i] != 0 ? taps[0] | taps[1] << 16 : taps[1] | taps[2] << 16;
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
  constexpr int ELEMENT = sizeof(T), N = kVectorBytes / ELEMENT;
  constexpr int kNever = -(1 << 29);  // a row that no walk comes to
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
  // Thread i copies the pieces of image i.
  const auto fetch = [&](int index, int stage) {
    const int i = threadIdx.x;
    if (i >= a.images || index >= end_unit) return;
    const Unit unit(a, index, K, S);
    const int count = i < unit.images ? unit.planes * unit.in_rows * a.in_w : 0;
    const auto* input = static_cast<const T*>(a.input);
    fetch_piece(reinterpret_cast<T*>(shared + kMargin + stage * stage_bytes + i * a.in_pitch),
                input + unit.source(a, i < unit.images ? i : 0), count, input + a.in_elements,
                &arrived[stage]);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(&arrived[i], a.images);
  }
  __syncthreads();
  for (int i = 0; i < kStages; ++i) fetch(first_unit + i, i);

  const OutputForm<Traits::kForm, T, 2> form(a.activation);
  const int tiles = static_cast<int>(a.by_tiles.value), tasks = a.planes * tiles;
  const int all_steps = (a.segment_rows - 1) * S + K;  // rows of input of a walk
  const int out_row_bytes = a.out_w * ELEMENT;
  const int in_image = a.channels * a.in_h * a.in_w % N;  // modulo a vector
  const int out_image = a.channels * a.out_h * a.out_w % N;
  const bool out_pairs = a.out_w % 2 == 0;  // a pair of outputs is one word, all of it in the row

  uint32_t bands[2][K][PARTS];
  int loaded = -1;  // the bands
  float bias = 0.0f;
  uint32_t most = 0;  // of the outputs, or NaN
  uint32_t parity = 0;
  int stage = 0, buffer = 0;
  for (int index = first_unit; index < end_unit; ++index) {
    const Unit unit(a, index, K, S);
    const int in_lead = static_cast<int>(unit.source(a, 0) % N);
    const int out_lead = static_cast<int>(unit.target(a, 0) % N);
    const int top = unit.row * S - a.padding_h - unit.in_first;  // of the first walk, in its piece
    // Rows above the image are passed over where all walks begin with them.
    const int skipped = a.segments == 1 ? max(-top, 0) / S * S : 0;
    const int steps = all_steps - skipped;
    const int begin_row = skipped / S - (RING - 1);  // the row of output that is complete first
    for (int task = warp; task < tasks; task += warps) {
      uint32_t tile;
      const auto plane = static_cast<int>(a.by_tiles.divide(task, &tile));
      if (plane >= unit.planes) break;
      const int channel = unit.channel + plane;
      const int column = static_cast<int>(tile) * kTile;
      const int left = column * S - a.padding_w;
      const int begin = in_lead + (plane * unit.in_rows + top + skipped) * a.in_w + left;
      const int odd[2] = {begin & 1, (begin + a.in_w) & 1};
      if (2 * channel + odd[0] != loaded) {
        loaded = 2 * channel + odd[0];
        load_bands<Traits>(bands, odd, a, channel);
        if (a.bias != nullptr) bias = widen(static_cast<const T*>(a.bias)[channel]);
      }
      barrier_wait(&arrived[stage], parity);
      const Transform<T> transform(a, channel);
      // What of a lane's pairs lies in the image.
      uint32_t inside[2][PARTS];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const int x = left - odd[i] + kTile * part + lane % 4 * 2;
          inside[i][part] =
              (static_cast<unsigned>(x) < static_cast<unsigned>(a.in_w) ? 0xffffu : 0u) |
              (static_cast<unsigned>(x + 1) < static_cast<unsigned>(a.in_w) ? 0xffff0000u : 0u);
        }
      }
      const int columns = a.out_w - column - lane % 4 * 2;  // of a lane's pair, and behind it
      // Bytes from a window to that of the next row: each begins at an even element.
      const int to_next[2] = {(a.in_w - odd[1] + odd[0]) * ELEMENT,
                              (a.in_w - odd[0] + odd[1]) * ELEMENT};
      // Of walks lane / 4 and lane / 4 + 8: the row of the piece, bytes of shared memory at which
      // the lane's part of the window begins, rows of output, and where the lane's pair goes.
      int row[2], rows[2];
      uint32_t in_at[2], out_at[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t segment;
        const auto image = static_cast<int>(a.by_segments.divide(lane / 4 + 8 * i, &segment));
        const int first = static_cast<int>(segment) * a.segment_rows;
        const bool present = image < unit.images && first < unit.rows;
        rows[i] = present && columns > 0 ? min(a.segment_rows, unit.rows - first) : 0;
        row[i] = present ? top + skipped + first * S : kNever;
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
      for (int i = 0; i < RING * 4; ++i) sums[i / 4][i % 4] = bias;
      // The row to come is loaded while one is multiplied.
      uint32_t next[PARTS][2];
      bool within[2];
      const auto load_row = [&] {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          within[w] = static_cast<unsigned>(row[w]) < static_cast<unsigned>(unit.in_rows);
#pragma unroll
          for (int part = 0; part < PARTS; ++part)
            next[part][w] = load_shared(in_at[w] + part * kTile * ELEMENT, within[w]);
        }
      };
      load_row();
      int done = begin_row;  // the row of output that is complete next
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
              if (Traits::kForm == Form::kClamp && within[w]) x[part][w] = transform(x[part][w]);
              x[part][w] &= inside[i % 2][part];
            }
          }
#pragma unroll
          for (int w = 0; w < 2; ++w) ++row[w], in_at[w] += to_next[i % 2];
          load_row();
          multiply_row<Traits>(sums, i, x, bands[i % 2]);
          if ((i + 1 - K + K * S) % S != 0) continue;
          float (&sum)[4] = sums[(i + 1 - K + RING * S) / S % RING];
          uint32_t pairs[2];
          bool wanted[2];
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            float pair[2] = {sum[2 * w], sum[2 * w + 1]};
            pairs[w] = form.apply(pair).data[0];
            most = maximum_word<T>(most, pairs[w]);
            wanted[w] = static_cast<unsigned>(done) < static_cast<unsigned>(rows[w]);
            sum[2 * w] = sum[2 * w + 1] = bias;
          }
          ++done;
          if (out_pairs) {
            store_shared(out_at[0], pairs[0], wanted[0]);
            store_shared(out_at[1], pairs[1], wanted[1]);
          } else {
#pragma unroll
            for (int w = 0; w < 2; ++w) {
              const uint32_t pair = pairs[w];
              store_shared(out_at[w], static_cast<uint16_t>(pair), wanted[w]);
              store_shared(out_at[w] + ELEMENT, static_cast<uint16_t>(pair >> 16),
                           wanted[w] && columns > 1);
            }
          }
          out_at[0] += out_row_bytes, out_at[1] += out_row_bytes;
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

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, const Device& device,
                         cudaStream_t stream) {
  const Cut cut = choose_cut(p, device);
  if (cut.rows == 0) return cudaErrorInvalidValue;
  const bool plain = form_of(p) == Form::kPlain;
#define DWSWAP_CASE(K, S)                                                         \
  if (p.kernel_h == K && p.stride_h == S) {                                       \
    return plain ? launch<Traits<T, K, S, Form::kPlain>>(p, cut, device, stream)  \
                 : launch<Traits<T, K, S, Form::kClamp>>(p, cut, device, stream); \
  }
  DWSWAP_PLANE_BANDS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const DepthwiseConv2dParams&, const Device&, cudaStream_t)

}  // namespace plane_bands
}  // namespace dwswap
