// Half precision on the tensor cores, both layouts: for kernels with so many taps that the other
// families are bound by arithmetic.
//
// For one channel and one row of taps, 8 neighbouring outputs are a product of the 16 inputs (or
// 32, or 48) that they see with a band matrix, 16 x 8, whose columns are the taps, each shifted by
// the stride: a Toeplitz matrix. With 16 rows of output as the rows of the other matrix, that is
// one mma.m16n8k16 per row of taps for 128 outputs. The rows of taps add up in the accumulators;
// the next row of taps is an address further on.
//
// A unit is some channels of some images, some rows and columns of output. A warp takes one channel
// of its tile after another and leaves the outputs in the place of the inputs. A block keeps its
// channels, and so its bands, for all its units.
//
// The zeros of the band meet inputs outside the window: 0 * infinity is NaN. A unit with an
// infinity or a NaN is computed without the tensor cores.
#pragma once

#include <algorithm>

#include "common/matrix.cuh"
#include "depthwise_conv2d/toeplitz_tile.cuh"

namespace dwswap {
namespace toeplitz {

// The bands of a block's channels. Column j of a window (of the first of 8 outputs) meets tap
// (j - (lead - padding)) / dilation; the band begins 7 strides before column 0, and its second copy
// an element later.
template <typename Traits>
__device__ __forceinline__ void write_bands(uint32_t* bands, int channel, int channels,
                                            const Arguments& a) {
  using T = typename Traits::T;
  constexpr int WORDS = Traits::kBandWords;
  const int shift = (kTile - 1) * Traits::kStride + a.lead - a.padding_w;
  const int rows = channels * a.kernel_h;
  for (int i = threadIdx.x; i < rows * WORDS; i += blockDim.x) bands[i] = 0;
  __syncthreads();
  const T* const weight =
      static_cast<const T*>(a.weight) + static_cast<int64_t>(channel) * a.kernel_h * a.kernel_w;
  for (int i = threadIdx.x; i < rows * a.kernel_w; i += blockDim.x) {
    const int row = i / a.kernel_w;
    const int at = shift + i % a.kernel_w * a.dilation_w;
    T* const band = reinterpret_cast<T*>(bands + row * WORDS);
    band[at] = weight[i];
    if constexpr (Traits::kStride == 1) band[WORDS + at - 1] = weight[i];
  }
}

// Sums of a lane: 4 per tile, columns 2 (lane % 4) and the next of rows lane / 4 and lane / 4 + 8.
template <typename Traits>
using Sums = float[Traits::kTiles * 4];

// 16 rows of one channel. `address` is what the lane passes to load_matrices, `band` the word that
// it begins with.
template <typename Traits>
__device__ __forceinline__ void multiply_rows(Sums<Traits>& sums, uint32_t address,
                                              const uint32_t* band, const Arguments& a) {
  using T = typename Traits::T;
  constexpr int STEPS = Traits::kSteps, S = Traits::kStride, TILES = Traits::kTiles;
  constexpr int TILE_BYTES = kTile * sizeof(T);
  const uint32_t row_bytes = a.dilation_h * Traits::kRow * sizeof(T);
#pragma unroll 2
  for (int h = 0; h < a.kernel_h; ++h, address += row_bytes, band += Traits::kBandWords) {
    uint32_t b[STEPS][2];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      b[s][0] = band[s * kStep / 2];
      b[s][1] = band[s * kStep / 2 + kTile / 2];
    }
    // The operand must lie in neighbouring registers, so windows at odd tiles are loaded anew.
#pragma unroll
    for (int first = 0; first < 3 - S; ++first) {
      constexpr int WINDOWS = S == 1 ? (TILES + 1) / 2 + STEPS - 1 : TILES + STEPS - 1;
      uint32_t x[WINDOWS][4];
#pragma unroll
      for (int i = 0; i < WINDOWS; ++i) {
        if (2 * i + first < S * (TILES - 1) + 2 * STEPS - 1)
          load_matrices(x[i], address + (2 * i + first) * TILE_BYTES);
      }
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int t = first; t < TILES; t += 3 - S) {
          const auto& window = x[(S * t - first) / 2 + s];
          multiply_add<T>(sums + 4 * t, window, b[s]);
        }
      }
    }
  }
}

// One row of one channel without the tensor cores: the lanes take the columns.
template <typename Traits>
__device__ __forceinline__ void convolve_row(const typename Traits::T* window,
                                             typename Traits::T* target,
                                             const typename Traits::T* weight, float bias,
                                             int columns, const Arguments& a) {
  const int lane = threadIdx.x % 32;
  float sums[2] = {bias, bias};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = lane + 32 * i;
    if (column >= columns) break;
    const auto* at = window + column * Traits::kStride + a.lead - a.padding_w;
    for (int h = 0; h < a.kernel_h; ++h, at += a.dilation_h * Traits::kRow) {
      for (int w = 0; w < a.kernel_w; ++w)
        sums[i] += widen(at[w * a.dilation_w]) * widen(weight[h * a.kernel_w + w]);
    }
  }
  activate(sums, a.activation);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (lane + 32 * i < columns) target[lane + 32 * i] = narrow<typename Traits::T>(sums[i]);
  }
  __syncwarp();
}

template <typename Traits>
__global__ void __launch_bounds__(kMaxThreads, 2) kernel(const Arguments a) {
  using T = typename Traits::T;
  constexpr int TILES = Traits::kTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  T* const tile = reinterpret_cast<T*>(shared);
  const int tile_elements = a.unit_channels / kGroup * a.group;
  auto* const bands = reinterpret_cast<uint32_t*>(tile + tile_elements);
  const auto shared_tile = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  const int chunk = blockIdx.x % a.chunks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  // Of the band matrix, a lane holds rows 2 (lane % 4) and the next, column lane / 4.
  constexpr int COPIES = Traits::kStride == 1 ? 2 : 1;
  const int shift = (kTile - 1 - lane / 4) * Traits::kStride;
  const uint32_t* const lane_bands =
      bands + shift % 2 * (Traits::kBandWords / COPIES) + shift / 2 + lane % 4;

  for (int i = threadIdx.x * kGroup; i < tile_elements; i += blockDim.x * kGroup)
    *reinterpret_cast<uint4*>(tile + i) = {};
  const int channel = chunk * a.unit_channels;
  write_bands<Traits>(bands, channel, min(a.unit_channels, a.channels - channel), a);
  for (int index = blockIdx.x / a.chunks; index < a.units; index += a.parts) {
    const Unit u = unit_at<Traits>(a, index, chunk);
    const bool usable = load_unit<Traits>(tile, u, a);
    const bool exact = __syncthreads_or(!usable);

    const int columns = min(TILES * kTile, a.out_w - u.column);
    const int rows = u.images * a.unit_rows;
    const auto bias_of = [&](int c) {
      return a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[u.channel + c]);
    };
    if (exact) {
      for (int c = warp; c < u.channels; c += warps) {
        const T* const weight = static_cast<const T*>(a.weight) +
                                static_cast<int64_t>(u.channel + c) * a.kernel_h * a.kernel_w;
        for (int row = 0; row < rows; ++row) {
          uint32_t y;
          const int image = a.by_rows.divide(row, &y);
          T* const at = tile + channel_at<Traits>(c, a) + image * a.in_rows * Traits::kRow;
          convolve_row<Traits>(at + static_cast<int>(y) * a.stride_h * Traits::kRow,
                               at + static_cast<int>(y) * Traits::kRow + a.shift, weight,
                               bias_of(c), columns, a);
        }
      }
    } else {
      for (int top = 0; top < rows; top += kTileRows) {
        uint32_t y;
        const int row = min(top + lane % kTileRows, rows - 1);
        const int image = a.by_rows.divide(row, &y);
        const int image_row = image * a.in_rows;
        const uint32_t address =
            shared_tile + ((image_row + static_cast<int>(y) * a.stride_h) * Traits::kRow +
                           lane / kTileRows * kTile) *
                              static_cast<int>(sizeof(T));
        const int target = (image_row + static_cast<int>(y)) * Traits::kRow + a.shift;
        T* const upper = tile + __shfl_sync(~0u, target, lane / 4) + lane % 4 * 2;
        T* const lower = tile + __shfl_sync(~0u, target, lane / 4 + 8) + lane % 4 * 2;
        const int upper_columns = top + lane / 4 < rows ? columns - lane % 4 * 2 : 0;
        const int lower_columns = top + lane / 4 + 8 < rows ? columns - lane % 4 * 2 : 0;
        for (int c = warp; c < u.channels; c += warps) {
          const int offset = channel_at<Traits>(c, a);
          const float bias = bias_of(c);
          Sums<Traits> sums;
#pragma unroll
          for (int i = 0; i < TILES * 4; ++i) sums[i] = bias;
          multiply_rows<Traits>(sums, address + offset * static_cast<int>(sizeof(T)),
                                lane_bands + c * a.kernel_h * Traits::kBandWords, a);
          activate_by_calls(sums, a.activation);
          __syncwarp();
          // The element behind a row is zero for the next unit.
          const auto put = [&](T* at, int left, float first, float second) {
            if (left > 0)
              *reinterpret_cast<uint32_t*>(at) =
                  narrow_pair<T>(first, second) & (left > 1 ? ~0u : 0xffffu);
          };
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
            put(upper + offset + t * kTile, upper_columns - t * kTile, sums[4 * t],
                sums[4 * t + 1]);
            put(lower + offset + t * kTile, lower_columns - t * kTile, sums[4 * t + 2],
                sums[4 * t + 3]);
          }
        }
        __syncwarp();
      }
    }
    __syncthreads();
    store_unit<Traits>(tile, u, a);
    __syncthreads();
  }
}

inline Mover choose_mover(Layout layout, const void* pointer, int64_t channels, int64_t height,
                          int64_t width, bool whole_planes) {
  if (layout == Layout::kChannelsLast) return Mover::kPixels;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool rows4 = width % 4 == 0 && address % 8 == 0;
  if (whole_planes && !rows4 && channels % kGroup == 0 && address % 16 == 0)
    return width % 2 == 0 ? Mover::kPlanePairs : Mover::kPlanes;
  if (rows4) return Mover::kRows4;
  return width % 2 == 0 && address % 4 == 0 ? Mover::kRows2 : Mover::kRows1;
}

template <typename Traits>
cudaError_t launch(const DepthwiseConv2dParams& p, const Cut& cut, const Device& device,
                   cudaStream_t stream) {
  Arguments a{};
  a.input = p.input, a.weight = p.weight, a.bias = p.bias, a.input_bias = p.input_bias;
  a.output = p.output;
  a.batch = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.in_h = static_cast<int>(p.in_h), a.in_w = static_cast<int>(p.in_w);
  a.out_h = static_cast<int>(p.out_h), a.out_w = static_cast<int>(p.out_w);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.stride_h = static_cast<int>(p.stride_h);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.unit_channels = cut.channels, a.unit_images = cut.images, a.unit_rows = cut.rows;
  a.in_rows = cut.in_rows;
  a.group = cut.group_elements(Traits::kStride);
  const Columns columns = choose_columns(p, cut);
  a.lead = columns.lead, a.shift = columns.shift;
  a.first_column = columns.first, a.columns = columns.count;
  const auto tiles = static_cast<uint32_t>(ceil_div(p.out_w, cut.tiles * kTile));
  const auto strips = static_cast<uint32_t>(ceil_div(p.out_h, cut.rows));
  a.chunks = static_cast<int>(ceil_div(p.channels, cut.channels));
  a.units = static_cast<int>(tiles * strips * ceil_div(p.batch, cut.images));
  a.by_columns = Divisor(tiles), a.by_strips = Divisor(strips);
  a.by_in_rows = Divisor(cut.in_rows), a.by_rows = Divisor(cut.rows);
  a.by_images = Divisor(cut.images);
  a.by_in_plane = Divisor(static_cast<uint32_t>(p.in_h * p.in_w));
  a.by_in_width = Divisor(static_cast<uint32_t>(p.in_w));
  a.by_out_plane = Divisor(static_cast<uint32_t>(p.out_h * p.out_w));
  a.by_out_width = Divisor(static_cast<uint32_t>(p.out_w));
  a.in_mover = choose_mover(p.in_layout, p.input, p.channels, p.in_h, p.in_w,
                            columns.whole && strips == 1 && p.in_h + p.padding_h <= cut.in_rows);
  a.out_mover =
      choose_mover(p.out_layout, p.output, p.channels, p.out_h, p.out_w, tiles == 1 && strips == 1);
  a.transforms_input = p.transforms_input();
  a.input_activation = p.input_activation, a.activation = p.activation;

  const auto function = kernel<Traits>;
  const auto shared = static_cast<int>(cut.shared_bytes(Traits::kStride, p.kernel_h));
  cudaError_t status = cudaSuccess;
  if (shared > 48 * 1024) {
    status = allow_shared_memory(function, device);
    if (status != cudaSuccess) return status;
  }
  int resident = 0;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, cut.threads, shared);
  if (status != cudaSuccess) return status;
  const int64_t wanted =
      ceil_div(static_cast<int64_t>(device.multiprocessors) * resident, a.chunks);
  a.parts = static_cast<int>(std::clamp<int64_t>(wanted, 1, a.units));
  function<<<a.chunks * a.parts, cut.threads, shared, stream>>>(a);
  return cudaGetLastError();
}

// One file per element type and stride instantiates this: together they take long.
template <typename T, int STRIDE>
cudaError_t launch_cut(const DepthwiseConv2dParams& params, const Cut& cut, const Device& device,
                       cudaStream_t stream) {
#define DWSWAP_CASE(STEPS, S, TILES)                                          \
  if constexpr (S == STRIDE) {                                                \
    if (cut.steps == STEPS && cut.tiles == TILES)                             \
      return launch<Traits<T, STEPS, S, TILES>>(params, cut, device, stream); \
  }
  DWSWAP_TOEPLITZ_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

#define DWSWAP_LAUNCH_CUT(T, STRIDE)                                                         \
  cudaError_t launch_cut<T, STRIDE>(const DepthwiseConv2dParams&, const Cut&, const Device&, \
                                    cudaStream_t)

}  // namespace toeplitz
}  // namespace dwswap
