// channels_last in half precision on the tensor cores, K = 5 and 7, stride 1 and 2 (sm_90).
//
// For 8 channels and two neighbouring taps, 16 pixels of output are the product of a 16 x 16 matrix
// (the pixels that the taps see, 8 channels of either) with two diagonal 8 x 8 matrices under each
// other, which hold the taps. Pixels come from shared memory as the copy engine put them there, by
// ldmatrix; the diagonals stay in registers. 7 of 8 products are with zeros, and still a row of
// taps takes fewer instructions than its multiply-adds would.
//
// A block keeps some channels. It walks down the rows of one unit after another, a stage of rows at
// a time, while the copy engine fetches the stages behind. Every row of input is read once, and
// added to all the rows of output that see it; a row of output that is complete leaves by way of
// shared memory and the copy engine.
//
// An infinity or a NaN would reach the other channels, as 0 * infinity is NaN. A unit in whose
// outputs one is found is computed anew without the tensor cores.
#pragma once

#include <limits>

#include "common/integer.h"
#include "common/matrix.cuh"
#include "common/numeric.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/diagonal_cut.h"
#include "depthwise_conv2d/exact.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace diagonal {

template <typename T_, int K_, int STRIDE_, Form FORM_, int SHIFT_>
struct Traits {
  using T = T_;
  static constexpr Form kForm = FORM_;   // of the output: kClamp or kAny
  static constexpr int kShift = SHIFT_;  // row_shift()
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kProducts = products_of_warp(K_);
  static constexpr int kRing = ring_rows(K_, STRIDE_);
  static constexpr int kStageRows = stage_rows(K_, STRIDE_);
  static constexpr int kPairs = K_ / 2;  // of taps in a row; the last tap has none
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  void* output;
  int batch, channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int columns, images, unit_rows;
  int stages;  // of a unit
  int units, chunks, parts;
  int rows_end;  // of the input
  int tile_row_bytes;
  uint32_t stage_bytes, box_bytes, result_bytes;
  Divisor by_columns, by_strips;
  Activation activation;
};

struct Unit {
  int image, row, column;  // of output, the first ones
};

__device__ __forceinline__ Unit unit_at(const Arguments& a, int index) {
  uint32_t column, strip;
  const uint32_t image = a.by_strips.divide(a.by_columns.divide(index, &column), &strip);
  return {static_cast<int>(image) * a.images, static_cast<int>(strip) * a.unit_rows,
          static_cast<int>(column) * a.columns};
}

// The copy engine's swizzle of pixels of 64 bytes: their 16-byte pieces change places, by the lines
// of 128 bytes in which they are.
constexpr int kLineBytes = kLinePixels * kPixelBytes;
__device__ __forceinline__ uint32_t swizzled(uint32_t byte) { return byte ^ (byte >> 3 & 0x30); }
static_assert(kPixelBytes == 64 && kLineBytes == 128 && kAlignment % (kPeriod * kLineBytes) == 0);

// One output without the tensor cores.
template <typename Traits>
__device__ float convolve(const Arguments& a, int n, int y, int x, int c) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  const auto* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * K * K;
  const auto* first =
      static_cast<const T*>(a.input) + static_cast<int64_t>(n) * a.in_h * a.in_w * a.channels + c;
  const Channel<T> channel{first, int64_t{a.in_w} * a.channels, a.channels, a.in_h, a.in_w};
  const float bias = a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[c]);
  float sum[1] = {bias + sum_window<K>(channel, y * S - a.padding_h, x * S - a.padding_w,
                                       [&](T element, int tap) {
                                         return widen(element) * widen(weight[tap]);
                                       })};
  activate(sum, a.activation);
  return sum[0];
}

template <typename Traits>
__device__ __noinline__ void recompute(const Arguments& a, int first_channel) {
  using T = typename Traits::T;
  const int channels = min(kUnitChannels, a.channels - first_channel);
  for (int index = blockIdx.x / a.chunks; index < a.units; index += a.parts) {
    const Unit u = unit_at(a, index);
    const int images = min(a.images, a.batch - u.image);
    const int rows = min(a.unit_rows, a.out_h - u.row);
    const int columns = min(a.columns, a.out_w - u.column);
    for (int i = threadIdx.x; i < images * rows * columns * channels; i += blockDim.x) {
      const int c = first_channel + i % channels, pixel = i / channels;
      const int x = u.column + pixel % columns, y = u.row + pixel / columns % rows;
      const int n = u.image + pixel / columns / rows;
      static_cast<T*>(
          a.output)[((static_cast<int64_t>(n) * a.out_h + y) * a.out_w + x) * a.channels + c] =
          narrow<T>(convolve<Traits>(a, n, y, x, c));
    }
  }
}

#if DWSWAP_BULK_COPIES

// The diagonals of a warp's channels: entry (k, n) of an 8 x 8 matrix is the tap of channel n where
// k == n. A lane holds k = 2 (lane % 4) and the next, n = lane / 4.
template <typename Traits>
__device__ __forceinline__ void load_diagonals(uint32_t (&taps)[Traits::kKernel * Traits::kKernel],
                                               const Arguments& a, int channel) {
  using T = typename Traits::T;
  constexpr int TAPS = Traits::kKernel * Traits::kKernel;
  const int lane = threadIdx.x % 32, n = lane / 4;
  const bool mine = n / 2 == lane % 4 && channel + n < a.channels;
  const auto* weight =
      static_cast<const uint16_t*>(a.weight) + static_cast<int64_t>(channel + n) * TAPS;
#pragma unroll
  for (int i = 0; i < TAPS; ++i)
    taps[i] = mine ? static_cast<uint32_t>(weight[i]) << (n % 2 * 16) : 0;
}

#endif

template <typename Traits>
__global__ void __launch_bounds__(32 * kGroups * kMostTeams)
    kernel(const __grid_constant__ CUtensorMap input_map,
           const __grid_constant__ CUtensorMap output_map, const __grid_constant__ Arguments a) {
#if DWSWAP_BULK_COPIES
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  constexpr int RING = Traits::kRing, STAGE_ROWS = Traits::kStageRows, PAIRS = Traits::kPairs;
  constexpr int PRODUCTS = Traits::kProducts;
  extern __shared__ __align__(kAlignment) unsigned char shared[];
  unsigned char* const results = shared + kSlots * a.stage_bytes;
  auto* const full = reinterpret_cast<uint64_t*>(results + 2 * RING * a.result_bytes);

  const int chunk = blockIdx.x % a.chunks, part = blockIdx.x / a.chunks;
  const int first_channel = chunk * kUnitChannels;
  const int group = threadIdx.x / 32 % kGroups, team = threadIdx.x / (32 * kGroups);
  const int lane = threadIdx.x % 32;
  const int channel = first_channel + group * kGroup;

  // The next stage that thread 0 asks for.
  Unit ahead = unit_at(a, part);
  int ahead_index = part, ahead_stage = 0;
  const auto fetch = [&](int slot) {
    if (ahead_index >= a.units) return;
    barrier_expect(&full[slot], a.box_bytes);
    copy_box(shared + slot * a.stage_bytes, &input_map, &full[slot], first_channel,
             ahead.column * S - a.padding_w, ahead.row * S - a.padding_h + ahead_stage * STAGE_ROWS,
             ahead.image);
    if (++ahead_stage < a.stages) return;
    ahead_stage = 0, ahead_index += a.parts;
    ahead = unit_at(a, ahead_index);
  };
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) barrier_init(&full[slot]);
    for (int slot = 0; slot < kSlots; ++slot) fetch(slot);
  }

  uint32_t taps[K * K];
  load_diagonals<Traits>(taps, a, channel);
  float bias[2] = {};
  if (a.bias != nullptr && channel + lane % 4 * 2 < a.channels)
    load(static_cast<const T*>(a.bias) + channel + lane % 4 * 2, bias);

  // Of the 16 pixels of a product, a lane gives the address of one, at either of two taps. The
  // pixels of a row are those of all images of a unit.
  const uint32_t origin = shared_address(shared);
  const int first_pixel = team * PRODUCTS * kProductPixels;
  // Two taps are a line. Line j of row i lies at the row's address + j lines + the place that is
  // i * kShift + j lines into a period.
  uint32_t places[PRODUCTS][kPeriod];
#pragma unroll
  for (int p = 0; p < PRODUCTS; ++p) {
    const int pixel = min(first_pixel + p * kProductPixels + lane % 16, a.columns * a.images - 1);
    const uint32_t byte = pixel / a.columns * STAGE_ROWS * a.tile_row_bytes +
                          (pixel % a.columns * S + lane / 16) * kPixelBytes + group * 16;
#pragma unroll
    for (int j = 0; j < kPeriod; ++j)
      places[p][j] = swizzled(byte + j * kLineBytes) - j * kLineBytes;
  }
  // All the pixels of a warp are stored at once.
  const int stored_pixel = first_pixel + lane % (PRODUCTS * kProductPixels);
  uint32_t row_target = shared_address(results) + swizzled(stored_pixel * kPixelBytes + group * 16);
  __syncthreads();

  Unit u = unit_at(a, part);
  int index = part, stage = 0, slot = 0;
  uint32_t parity = 0, buffer = 0;
  const OutputForm<Traits::kForm, T, 4 * PRODUCTS> form(a.activation);
  uint32_t most = 0;  // of the outputs, or NaN
  float sums[PRODUCTS][RING][4];
  // What a lane gets from itself the compiler takes for another value, and keeps all four in the
  // registers of a product's sums; it would copy two of them anew for every row.
  const float start[4] = {bias[0], bias[1], __shfl_sync(0xffffffff, bias[0], lane),
                          __shfl_sync(0xffffffff, bias[1], lane)};
  const auto reset = [&](float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = start[e];
  };
  const auto reset_all = [&] {
#pragma unroll
    for (int i = 0; i < PRODUCTS * RING; ++i) reset(sums[i / RING][i % RING]);
  };
  reset_all();
  while (true) {
    barrier_wait(&full[slot], parity);
    const int top = u.row * S - a.padding_h + stage * STAGE_ROWS;
    uint32_t row_address = origin + slot * a.stage_bytes;
#pragma unroll
    for (int i = 0; i < STAGE_ROWS; ++i) {
      // Rows outside add nothing. Above the image all sums are still what the unit began with, and
      // below it none begins that is needed: rows_end sees to that.
      if (static_cast<unsigned>(top + i) < static_cast<unsigned>(a.rows_end)) {
#pragma unroll
        for (int p = 0; p < PRODUCTS; ++p) {
#pragma unroll
          for (int j = 0; j <= PAIRS; ++j) {
            uint32_t x[4], last[2];
            const int place = (i * Traits::kShift + j) % kPeriod;
            const uint32_t address = row_address + places[p][place] + j * kLineBytes;
            if (j < PAIRS) {
              load_matrices(x, address);
            } else {
              load_matrices(last, address);
            }
#pragma unroll
            for (int h = 0; h < K; ++h) {
              if ((i - h + K * S) % S != 0) continue;
              float (&sum)[4] = sums[p][(i - h + RING * S) / S % RING];
              if (j == 0 && h == 0) reset(sum);
              if (j < PAIRS) {
                multiply_add<T>(sum, x, {taps[h * K + 2 * j], taps[h * K + 2 * j + 1]});
              } else {
                multiply_add<T>(sum, last, taps[h * K + K - 1]);
              }
            }
          }
        }
      }
      row_address += a.tile_row_bytes;
      if ((i + 1 - K + K * S) % S != 0) continue;
      float done[4 * PRODUCTS];
#pragma unroll
      for (int e = 0; e < 4 * PRODUCTS; ++e)
        done[e] = sums[e / 4][(i + 1 - K + RING * S) / S % RING][e % 4];
      if constexpr (Traits::kForm == Form::kAny) activate(done, a.activation);
      // Before the clamp, which keeps NaN: what is clamped then has one use, and needs no copies.
      const auto words = narrow_all<T>(done);
#pragma unroll
      for (int w = 0; w < 2 * PRODUCTS; w += 2)
        most = maximum_word<T>(most, maximum_word<T>(words.data[w], words.data[w + 1]));
      store_matrices(row_target, form.clamp(words).data);
      row_target += a.result_bytes;
    }
    if (threadIdx.x < RING) wait_for_bulk_reads();  // of the other buffer
    fence_for_bulk_copies();
    __syncthreads();
    if (threadIdx.x < RING) {
      const int row = stage * RING - (RING - 1) + static_cast<int>(threadIdx.x);
      if (row >= 0 && row < min(a.unit_rows, a.out_h - u.row))
        write_box(&output_map, results + (buffer * RING + threadIdx.x) * a.result_bytes,
                  first_channel, u.column, u.row + row, u.image);
      if (threadIdx.x == 0) fetch(slot);
    }
    buffer ^= 1;
    if (buffer == 0) row_target -= 2 * RING * a.result_bytes;
    if (++slot == kSlots) slot = 0, parity ^= 1;
    if (++stage < a.stages) continue;
    stage = 0, index += a.parts;
    if (index >= a.units) break;
    u = unit_at(a, index);
    reset_all();
  }
  if (threadIdx.x < RING) wait_for_bulk_writes();
  if (__syncthreads_or(has_nan<T>(most))) recompute<Traits>(a, first_channel);
#else
  __trap();  // the host chose it for an image of sm_90
#endif
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                   cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.output = p.output;
  a.batch = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.columns = cut.columns, a.images = cut.images, a.unit_rows = cut.rows;
  a.stages = cut.stages, a.units = cut.units, a.chunks = cut.chunks, a.parts = cut.parts;
  const int tile_columns = diagonal::tile_columns(cut.columns, K, S);
  // With a padding of at least the kernel's height, rows of output begin below the image: the zeros
  // that the copy engine leaves there are read like other rows.
  a.rows_end = p.padding_h < K ? a.in_h : std::numeric_limits<int>::max();
  a.tile_row_bytes = tile_columns * kPixelBytes;
  a.stage_bytes = cut.stage_bytes(K, S), a.result_bytes = cut.row_bytes(K);
  a.box_bytes = cut.images * Traits::kStageRows * a.tile_row_bytes;
  a.by_columns = Divisor(static_cast<uint32_t>(ceil_div(p.out_w, cut.columns)));
  a.by_strips = Divisor(static_cast<uint32_t>(ceil_div(p.out_h, cut.rows)));
  a.activation = p.activation;

  CUtensorMap input_map{}, output_map{};
  const Box out_box{kUnitChannels, cut.columns, 1, cut.images, true};
  Box in_box{kUnitChannels, tile_columns, Traits::kStageRows, cut.images, true};
  in_box.promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  if (!encode_input<T>(&input_map, p, in_box) || !encode_output<T>(&output_map, p, out_box))
    return cudaErrorInvalidValue;

  const auto function = kernel<Traits>;
  const int shared = cut.shared_bytes(K, S);
  const cudaError_t status = allow_shared_memory(function, device);
  if (status != cudaSuccess) return status;
  function<<<a.chunks * a.parts, cut.threads(), shared, stream>>>(input_map, output_map, a);
  return cudaGetLastError();
}

template <typename T, int K, int S, Form FORM>
cudaError_t launch_form(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                        cudaStream_t stream) {
  static_assert(kPeriod == 4);
  switch (row_shift(tile_columns(cut.columns, K, S))) {
    case 0:
      return launch<Traits<T, K, S, FORM, 0>>(p, cut, device, stream);
    case 1:
      return launch<Traits<T, K, S, FORM, 1>>(p, cut, device, stream);
    case 2:
      return launch<Traits<T, K, S, FORM, 2>>(p, cut, device, stream);
    default:
      return launch<Traits<T, K, S, FORM, 3>>(p, cut, device, stream);
  }
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& p, const Device& device,
                         cudaStream_t stream) {
  const Cut cut = choose_cut(p, device);
  if (cut.parts == 0) return cudaErrorInvalidValue;
#define DWSWAP_CASE(K, S)                                                   \
  if (p.kernel_h == K && p.stride_h == S) {                                 \
    return p.activation <= Activation::kRelu6                               \
               ? launch_form<T, K, S, Form::kClamp>(p, cut, device, stream) \
               : launch_form<T, K, S, Form::kAny>(p, cut, device, stream);  \
  }
  DWSWAP_CASE(5, 1)
  DWSWAP_CASE(5, 2)
  DWSWAP_CASE(7, 1)
  DWSWAP_CASE(7, 2)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const DepthwiseConv2dParams&, const Device&, cudaStream_t)

}  // namespace diagonal
}  // namespace dwswap
