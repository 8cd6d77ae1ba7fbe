// NCHW in half precision, the gradients of weight and bias on the tensor cores (sm_90): 3 x 3, 5 x
// 5 and 7 x 7, stride 1 and 2.
//
//   grad_weight[kh, kw] = sum over n, oh, ow of grad_output[n, oh, ow]
//                             input[n, S oh + kh - padding, S ow + kw - padding]
//
// For a row kh of taps, columns of grad_output and of the input are the operands of a product over
// the rows: all sums of a column by a column, as in a Gram matrix, of which those that are kw apart
// lie on diagonals. 8 columns of the input are multiplied by all of grad_output that see them,
// those of a tile of 8 and of the tile before it: a 16 x 8 matrix. Products of all tiles and images
// add up in registers; the diagonals are added up in the end. Other rows of taps have the same
// matrices of grad_output, and rows of the input that begin elsewhere: nothing is shifted, in
// memory or in registers.
//
// A warp has a channel. The copy engine brings planes as they are in memory, and the warp spreads
// them to rows at multiples of 16 bytes with zeros around, from which matrices are loaded
// transposed.
//
// An infinity or a NaN reaches the sums of its own channel alone.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/integer.h"
#include "common/matrix.cuh"
#include "common/warp_sums.cuh"
#include "depthwise_conv2d/backward/gram_sums_stage.cuh"
#include "depthwise_conv2d/backward/sums.cuh"

namespace dwswap {
namespace gram_sums {

template <typename T_, int K_, int STRIDE_, bool BIAS_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr bool kBias = BIAS_;  // few networks have one beside BatchNorm
  static constexpr int kTaps = K_ * K_;
};

#if DWSWAP_BULK_COPIES

// The sums of columns by columns.
template <typename Traits>
struct Products {
  using T = typename Traits::T;
  static constexpr int K = Traits::kKernel, S = Traits::kStride;
  float sums[S][K][4] = {};  // of the tiles of the input at multiples of S, and the next ones
  float bias[4] = {};

  // Of 16 rows. `input` and `grad` are the addresses that this lane gives of the first matrices.
  __device__ __forceinline__ void add(const Arguments& a, uint32_t input, uint32_t grad) {
    // Loads bring the matrices of two rows of taps, or those of two tiles.
    constexpr int LOADS = S == 1 ? (K + 1) / 2 : K;
    const int pitch = a.input.rows.pitch, odd_rows = a.input.rows.odd_rows;
    const auto rows_at = [&](int load) {
      return input + (S == 1 ? 2 * load * pitch : load % 2 * odd_rows + load / 2 * pitch);
    };
    // One step more, with zeros as the tile of grad_output: the last one sees the input's tile
    // behind its own.
    const auto add_tile = [&]<bool LAST>() {
      uint32_t g[4];  // of rows 0 to 7 of the tile and the one before it, and of rows 8 to 15
      load_transposed_matrices(g, grad);
      grad += kTileBytes;
      if (Traits::kBias && !LAST) multiply_add<T>(bias, g, {kOnes<T>, kOnes<T>});
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        if (S == 1 ? i == LOADS - 1 : LAST) {
          uint32_t x[2];  // of rows 0 to 7 and 8 to 15
          load_transposed_matrices(x, rows_at(i));
          multiply_add<T>(sums[0][S == 1 ? K - 1 : i], g, x);
        } else {
          uint32_t x[4];  // twice
          load_transposed_matrices(x, rows_at(i));
          multiply_add<T>(S == 1 ? sums[0][2 * i] : sums[0][i], g, {x[0], x[1]});
          multiply_add<T>(S == 1 ? sums[0][2 * i + 1] : sums[S - 1][i], g, {x[2], x[3]});
        }
      }
      input += S * kTileBytes;
    };
    const uint32_t end = grad + a.tiles * kTileBytes;
    // Two at a time take registers, of which a third block of 7 x 7 has none to spare.
    constexpr bool FEW_REGISTERS = S > 1 || (K == 7 && !Traits::kBias);
#pragma unroll(FEW_REGISTERS ? 1 : 2)
    while (grad != end) add_tile.template operator()<false>();
    add_tile.template operator()<true>();
  }
};

#endif

template <typename Traits>
__global__ void __launch_bounds__(kThreads,
                                  most_blocks(Traits::kKernel, Traits::kStride, Traits::kBias))
    kernel(const __grid_constant__ Arguments a, const Sums<typename Traits::T> target) {
#if DWSWAP_BULK_COPIES
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  extern __shared__ __align__(kCopyBytes) unsigned char shared[];
  const int share = blockIdx.x / a.groups, first_channel = blockIdx.x % a.groups * kChannels;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = first_channel + warp;
  // Where the warp spreads rows of the two images, and behind all of these the barriers.
  const uint32_t stages = shared_address(shared);
  const uint32_t input = stages + a.slots * a.stage_bytes + warp * a.spread_bytes;
  auto* const full =
      reinterpret_cast<uint64_t*>(shared + a.slots * a.stage_bytes + kChannels * a.spread_bytes);
  const Rows &in_rows = a.input.rows, &grad_rows = a.grad.rows;
  const uint32_t grad = input + a.together * in_rows.image_bytes;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < a.slots; ++slot) barrier_init(&full[slot]);
  }
  clear(input, a.spread_bytes);
  __syncthreads();
  const auto fetch_unit = [&](int index, int slot) {
    if (index < a.units)
      fetch(a, unit_at<S>(a, index), first_channel, shared + slot * a.stage_bytes, &full[slot]);
  };
  if (warp == 0) {
    for (int slot = 0; slot < a.slots; ++slot) fetch_unit(share + slot * a.shares, slot);
  }

  // The matrices whose rows a lane gives the addresses of: see Products.
  const int row = lane % 8, which = lane / 8 % 2, other = lane / 16;
  const int in_second = a.together == 2 ? in_rows.image_bytes : kTile * in_rows.pitch;
  const int grad_second = a.together == 2 ? grad_rows.image_bytes : kTile * grad_rows.pitch;
  const uint32_t input_at = input + row * in_rows.pitch + which * in_second +
                            other * (S == 1 ? in_rows.pitch : kTileBytes);
  const uint32_t grad_at =
      grad + row * grad_rows.pitch + other * grad_second + (1 - which) * kTileBytes;
  const Part input_part(a.input), grad_part(a.grad);

  Products<Traits> products;
  int slot = 0;
  uint32_t parity = 0;
  for (int index = share; index < a.units; index += a.shares) {
    const Unit u = unit_at<S>(a, index);
    barrier_wait(&full[slot], parity);
    uint32_t input_from = stages + slot * a.stage_bytes;
    uint32_t grad_from = input_from + a.grad.begin;
    if (a.whole_planes) {
      input_from += warp * a.input.height * a.input.width * 2;
      grad_from += warp * a.grad.height * a.grad.width * 2;
    } else {
      input_from += warp * a.input.bytes +
                    place_of<uint32_t>(a.input, a, u.image, channel, u.input) % kCopyBytes;
      grad_from += warp * a.grad.bytes +
                   place_of<uint32_t>(a.grad, a, u.image, channel, u.grad) % kCopyBytes;
      clear_around<S>(a.input, u.input, input);
      clear_around<1>(a.grad, u.grad, grad);
    }
    const uint32_t input_to =
        input + input_part.to(a.input) + place_of_row<S>(in_rows, u.input.begin + input_part.row);
    const uint32_t grad_to = grad + grad_part.to(a.grad) + grad_part.row * grad_rows.pitch;
    // From the lane's first piece on; less than none where it moves none.
    const int input_bytes =
        (u.input.end - u.input.begin) * a.input.width * 2 - input_part.from(a.input);
    const int grad_bytes = u.grad.end * a.grad.width * 2 - grad_part.from(a.grad);
    input_from += input_part.from(a.input), grad_from += grad_part.from(a.grad);
#pragma unroll 1
    for (int image = 0; image < u.images;) {
#pragma unroll 1
      for (int i = 0; i < a.together; ++i, ++image) {
        if (image < u.images) {
          spread(a.input, input_part, input_from, input_from + input_bytes,
                 input_to + i * in_rows.image_bytes);
          spread(a.grad, grad_part, grad_from, grad_from + grad_bytes,
                 grad_to + i * grad_rows.image_bytes);
        } else if (a.images > 1) {  // else it has zeros from the start
          clear(input + i * in_rows.image_bytes, in_rows.image_bytes);
          clear(grad + i * grad_rows.image_bytes, grad_rows.image_bytes);
        }
        input_from += a.input.bytes, grad_from += a.grad.bytes;
      }
      __syncwarp();
#pragma unroll 1
      for (int first = 0; first < u.grad.end; first += kStepRows)
        products.add(a, input_at + first * in_rows.pitch, grad_at + first * grad_rows.pitch);
      __syncwarp();
    }
    __syncthreads();
    if (warp == 0) fetch_unit(index + a.slots * a.shares, slot);
    if (++slot == a.slots) slot = 0, parity ^= 1;
  }

  release_next_kernel();
  // Of a matrix a lane has the columns lane / 4 of two tiles of grad_output, and two neighbouring
  // columns of the input.
  constexpr int COUNT = Traits::kTaps < 16 ? 16 : Traits::kTaps < 32 ? 32 : 64;
  float values[COUNT] = {};
#pragma unroll
  for (int kw = 0; kw < K; ++kw) {
#pragma unroll
    for (int part = 0; part < S; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int in_column = part * kTile + lane % 4 * 2 + i % 2;
        const int column = lane / 4 - i / 2 * kTile;
        if (in_column - S * column - a.unseen != kw) continue;
#pragma unroll
        for (int kh = 0; kh < K; ++kh) values[kh * K + kw] += products.sums[part][kh][i];
      }
    }
  }
  if (lane % 4 == 0) values[Traits::kTaps] = products.bias[0];
  add_up_warp(values);
  constexpr int HELD = COUNT < 32 ? 1 : COUNT / 32;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int value = lane * COUNT / 32 + i;
    if (value <= Traits::kTaps) target.set(share, channel, value, values[i]);
  }
#else
  __trap();  // the host chose it for an image of sm_90
#endif
}

inline Side side_of(const void* data, int64_t height, int64_t width, int64_t bytes,
                    const Rows& rows, int parts) {
  Side side{};
  side.data = static_cast<const unsigned char*>(data);
  side.height = static_cast<int>(height), side.width = static_cast<int>(width);
  side.bytes = static_cast<uint32_t>(bytes);
  side.rows = rows;
  side.pieces = pieces_of(width, rows);
  side.moved = 32 / side.pieces / parts * parts;
  side.from_step = side.moved * side.width * 2, side.to_step = side.moved / parts * rows.pitch;
  return side;
}

inline Arguments arguments_of(const GradientParams& p, const Cut& cut) {
  Arguments a{};
  a.input =
      side_of(p.input, p.in_h, p.in_w, cut.input_bytes, cut.input, static_cast<int>(p.stride_h));
  a.grad = side_of(p.grad_output, p.out_h, p.out_w, cut.grad_bytes, cut.grad, 1);
  a.grad.begin = static_cast<uint32_t>(cut.grad_begin());
  a.batch = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.out_h = static_cast<int>(p.out_h), a.padding_h = static_cast<int>(p.padding_h);
  a.unseen = cut.input.lead / 2 - static_cast<int>(p.padding_w);
  a.images = cut.images, a.rows = cut.rows;
  a.units = static_cast<int>(ceil_div(p.batch, cut.images) * cut.strips);
  a.shares = cut.shares, a.groups = a.channels / kChannels;
  a.tiles = static_cast<int>(ceil_div(p.out_w, kTile));
  a.whole_planes = cut.has_whole_planes(), a.together = cut.together;
  a.stage_bytes = static_cast<uint32_t>(cut.stage_bytes());
  a.spread_bytes = static_cast<uint32_t>(cut.spread_bytes());
  a.slots = cut.slots;
  a.by_strips = Divisor(static_cast<uint32_t>(cut.strips));
  return a;
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, const Device& device, cudaStream_t stream) {
  const Cut cut = choose_cut(p, device);
  const Arguments a = arguments_of(p, cut);
  const auto function = kernel<Traits>;
  const cudaError_t status = allow_shared_memory(function, device);
  if (status != cudaSuccess) return status;
  function<<<static_cast<unsigned>(a.groups * a.shares), kThreads, cut.shared_bytes(), stream>>>(
      a, Sums<typename Traits::T>(p, a.shares));
  return finish_launch(p, a.shares, stream);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, const Device& device, cudaStream_t stream) {
#define DWSWAP_CASE(K, S)                                                  \
  if (p.kernel_h == K && p.stride_h == S)                                  \
    return p.wants_bias ? launch<Traits<T, K, S, true>>(p, device, stream) \
                        : launch<Traits<T, K, S, false>>(p, device, stream);
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
  cudaError_t launch_typed<T>(const GradientParams&, const Device&, cudaStream_t)

}  // namespace gram_sums
}  // namespace dwswap
