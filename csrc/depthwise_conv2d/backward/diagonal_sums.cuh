// channels_last in half precision on the tensor cores, the gradients of weight and bias, K = 5 and
// 7, stride 1 and 2 (sm_90).
//
// Of 8 channels and 16 pixels, the product of what a tap sees of the input (8 channels x 16 pixels)
// and of grad_output (16 pixels x 8 channels) has the sums of that tap on its diagonal; a matrix
// instruction takes two taps side by side. 7 of 8 sums are of two channels and thrown away, and
// still a tap takes fewer instructions than its multiply-adds would. Both matrices come from shared
// memory as the copy engine put them there, transposed by ldmatrix.
//
// A block keeps some channels. It walks down the rows of one strip after another, a stage at a
// time, while the copy engine fetches the stages behind. Every row of input is read once, and
// multiplied by all the rows of grad_output that see it, which wait in registers. The sums are
// added up in the end.
//
// With stride 2 even and odd columns of the input are images of their own: pixels that are two
// apart would have their channels in the same banks.
//
// An infinity or a NaN reaches the sums of its own channel alone.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/integer.h"
#include "common/matrix.cuh"
#include "common/numeric.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/backward/diagonal_sums_cut.h"
#include "depthwise_conv2d/backward/strips.cuh"
#include "depthwise_conv2d/backward/sums.cuh"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace diagonal_sums {

template <typename T_, int K_, int STRIDE_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kSeen = seen_rows(K_, STRIDE_);
  static constexpr int kTaps = K_ * K_;
};

struct Arguments {
  int channels, padding_w;
  Strips strips;
  int stage_rows;
  int slices, shares;  // of channels, and of strips
  int groups, pixel_bytes;
  int input_row_bytes, grad_row_bytes;
  int box_channels;  // a block's are in one box or several
  uint32_t stage_bytes, part_bytes, plane_bytes, box_bytes;
  uint32_t swizzle;
  bool wants_bias;
};

// Of all columns, or of those with an even and an odd distance from a tile's first one.
template <int STRIDE>
struct InputMaps {
  CUtensorMap planes[STRIDE];
};

template <typename Traits>
__global__ void __launch_bounds__(32 * most_warps(Traits::kKernel))
    kernel(const __grid_constant__ InputMaps<Traits::kStride> input_maps,
           const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ Arguments a,
           const Sums<typename Traits::T> target) {
#if DWSWAP_BULK_COPIES
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, SEEN = Traits::kSeen;
  extern __shared__ __align__(kAlignment) unsigned char shared[];
  unsigned char* const zeros = shared + kSlots * a.stage_bytes;
  auto* const full = reinterpret_cast<uint64_t*>(zeros + kZerosBytes);

  const int share = blockIdx.x / a.slices, width = a.groups * kGroup;
  const int first_channel = blockIdx.x % a.slices * width;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp % a.groups, team = warp / a.groups;
  const int channels = min(width, a.channels - first_channel);
  const int boxes = (channels + a.box_channels - 1) / a.box_channels;

  // The next stage that thread 0 asks for. The strip is found anew each time: registers are few.
  int ahead_index = share, ahead_stage = 0;
  const auto fetch = [&](int slot) {
    if (ahead_index >= a.strips.count) return;
    const Strip ahead = strip_at<S, SEEN>(a.strips, ahead_index, a.stage_rows);
    const int row = ahead.row + ahead_stage * a.stage_rows;
    barrier_expect(&full[slot], boxes * a.box_bytes);
    for (int box = 0; box < boxes; ++box) {
      unsigned char* const part = shared + slot * a.stage_bytes + box * a.part_bytes;
      const int channel = first_channel + box * a.box_channels;
      // Column w of an image is column w / 2 of a plane. 2 ow is even, so that the plane of the
      // tile's first column is the same for all tiles.
      const int first = ahead.column * S - a.padding_w;
#pragma unroll
      for (int plane = 0; plane < S; ++plane)
        copy_box(part + plane * a.plane_bytes, &input_maps.planes[plane], &full[slot], channel,
                 S == 1 ? first : (first + plane) >> 1, row * S - a.strips.padding_h, ahead.image);
      copy_box(part + S * a.plane_bytes, &grad_map, &full[slot], channel, ahead.column, row,
               ahead.image);
    }
    if (++ahead_stage < ahead.stages) return;
    ahead_stage = 0, ahead_index += a.shares;
  };
  if (threadIdx.x == 0) {
    *reinterpret_cast<uint4*>(zeros) = uint4{};
    for (int slot = 0; slot < kSlots; ++slot) barrier_init(&full[slot]);
    for (int slot = 0; slot < kSlots; ++slot) fetch(slot);
  }

  // A lane gives the address of a pixel of one of four matrices: of grad_output the halves of both
  // products, zeros where there is no pixel for them; of the input the halves of a product at
  // either of two taps. The pixels of a row are those of all images of a stage.
  const int matrix = lane / 8, all_pixels = a.strips.columns * a.strips.images;
  const int first_pixel = team * kTeamPixels + lane % 8;
  const uint32_t origin = shared_address(shared), zeros_address = shared_address(zeros);
  const int box_groups = a.box_channels / kGroup;
  const uint32_t place = group / box_groups * a.part_bytes + group % box_groups * kGroupBytes;
  const int pixel = first_pixel + 8 * matrix;
  const bool has_pixel = pixel < all_pixels;
  const uint32_t grad_offset = S * a.plane_bytes + place +
                               pixel / a.strips.columns * a.stage_rows * a.grad_row_bytes +
                               pixel % a.strips.columns * a.pixel_bytes;
  uint32_t offsets[kProducts];
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    const int seen = min(first_pixel + 16 * p + matrix / 2 * 8, all_pixels - 1), tap = matrix % 2;
    const int column = seen % a.strips.columns + (S == 1 ? tap : 0);
    offsets[p] = (S == 1 ? 0 : tap * a.plane_bytes) + place + column * a.pixel_bytes +
                 seen / a.strips.columns * a.stage_rows * S * a.input_row_bytes;
  }
  // From a pair of taps to the next.
  const int pair_bytes = (S == 1 ? 2 : 1) * a.pixel_bytes;
  // The copy engine's swizzle: pieces of 16 bytes change places, by the lines of 128 bytes in which
  // they are. Stages begin where it begins anew.
  const auto load_pixels = [&](uint32_t (&x)[4], uint32_t address) {
    load_transposed_matrices(x, address ^ (address >> 3 & a.swizzle));
  };
  __syncthreads();

  // Of two taps side by side. Behind the last one of a row comes the next pixel of the stage, whose
  // sums are not used.
  constexpr int PAIRS = K / 2 + 1;
  float sums[K][PAIRS][4] = {}, bias[4] = {};
  uint32_t grad[kProducts][SEEN][2];  // the newest row first
  int slot = 0;
  uint32_t parity = 0;
  for (int item = share; item < a.strips.count; item += a.shares) {
    const Strip s = strip_at<S, SEEN>(a.strips, item, a.stage_rows);
#pragma unroll
    for (int i = 0; i < kProducts * SEEN; ++i)
      grad[i / SEEN][i % SEEN][0] = grad[i / SEEN][i % SEEN][1] = 0;
    int rows_left = s.rows, ih = s.row * S - a.strips.padding_h;
    for (int stage = 0; stage < s.stages; ++stage) {
      barrier_wait(&full[slot], parity);
      uint32_t row_address = origin + slot * a.stage_bytes;
      uint32_t grad_address = row_address + grad_offset;
#pragma unroll 1
      for (int r = 0; r < a.stage_rows; ++r) {
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
#pragma unroll
          for (int age = SEEN - 1; age > 0; --age)
            grad[p][age][0] = grad[p][age - 1][0], grad[p][age][1] = grad[p][age - 1][1];
        }
        uint32_t newest[4] = {};
        if (rows_left > 0) load_pixels(newest, has_pixel ? grad_address : zeros_address);
        grad[0][0][0] = newest[0], grad[0][0][1] = newest[1];
        grad[1][0][0] = newest[2], grad[1][0][1] = newest[3];
        if (a.wants_bias) multiply_add<T>(bias, newest, {kOnes<T>, kOnes<T>});
        --rows_left;
#pragma unroll
        for (int e = 0; e < S; ++e) {
          if (static_cast<unsigned>(ih) < static_cast<unsigned>(a.strips.in_h)) {
            // It is row e of the windows of the newest row of grad_output, row e + S of those of
            // the one before, and so on.
#pragma unroll
            for (int p = 0; p < kProducts; ++p) {
#pragma unroll
              for (int i = 0; i < PAIRS; ++i) {
                uint32_t x[4];  // the lower halves of the pixels at either tap, then the upper ones
                load_pixels(x, row_address + offsets[p] + i * pair_bytes);
#pragma unroll
                for (int kh = e; kh < K; kh += S) multiply_add<T>(sums[kh][i], x, grad[p][kh / S]);
              }
            }
          }
          row_address += a.input_row_bytes;
          ++ih;
        }
        grad_address += a.grad_row_bytes;
      }
      __syncthreads();
      if (threadIdx.x == 0) fetch(slot);
      if (++slot == kSlots) slot = 0, parity ^= 1;
    }
  }

  release_next_kernel();
  // [team][value][channel]. A lane has two columns of a row: one lane of a row has its diagonal.
  __syncthreads();
  auto* const partials = reinterpret_cast<float*>(shared);
  const int own = lane / 4;
  float* const mine = partials + team * (Traits::kTaps + 1) * width + group * kGroup + own;
  if (lane % 4 == own / 2) {
    const auto diagonal = [&](const float (&sum)[4], int half) {
      return own % 2 == 0 ? sum[2 * half] : sum[2 * half + 1];
    };
#pragma unroll
    for (int i = 0; i < Traits::kTaps; ++i)
      mine[i * width] = diagonal(sums[i / K][i % K / 2], i % K % 2);
    mine[Traits::kTaps * width] = diagonal(bias, 0) + diagonal(bias, 1);
  }
  __syncthreads();
  const int values = (Traits::kTaps + 1) * width, teams = blockDim.x / (32 * a.groups);
  for (int i = threadIdx.x; i < values; i += blockDim.x) {
    float sum = partials[i];
    for (int other = 1; other < teams; ++other) sum += partials[other * values + i];
    if (i % width < channels) target.set(share, first_channel + i % width, i / width, sum);
  }
#else
  __trap();  // the host chose it for an image of sm_90
#endif
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, const Cut& cut, const Device& device,
                   cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int S = Traits::kStride;
  Arguments a{};
  a.channels = static_cast<int>(p.channels), a.padding_w = static_cast<int>(p.padding_w);
  a.strips = Strips(p, cut.split.rows, cut.columns, cut.images);
  a.stage_rows = cut.stage_rows;
  a.slices = static_cast<int>(ceil_div(p.channels, cut.groups * kGroup));
  a.groups = cut.groups, a.pixel_bytes = cut.pixel_bytes();
  a.input_row_bytes = cut.input_columns() * cut.pixel_bytes();
  a.grad_row_bytes = cut.columns * cut.pixel_bytes();
  a.box_channels = cut.box_groups() * kGroup, a.part_bytes = cut.part_bytes();
  a.stage_bytes = cut.stage_bytes(), a.plane_bytes = cut.plane_bytes();
  a.box_bytes = cut.images * cut.stage_rows * (S * S * a.input_row_bytes + a.grad_row_bytes);
  a.swizzle = cut.swizzle();
  a.wants_bias = p.wants_bias;
  a.shares = static_cast<int>(cut.split.shares);

  // The cache reads little beside a block's channels.
  const Box grad_box{.channels = a.box_channels,
                     .columns = cut.columns,
                     .rows = cut.stage_rows,
                     .images = cut.images,
                     .swizzled = cut.swizzle() != 0,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B};
  Box input_box = grad_box;
  input_box.columns = cut.input_columns(), input_box.rows = S * cut.stage_rows;
  InputMaps<S> input_maps{};
  CUtensorMap grad_map{};
  for (int plane = 0; plane < S; ++plane) {
    const int first = (static_cast<int>(p.padding_w) + plane) % S;
    if (!encode_columns<T>(&input_maps.planes[plane], p.input, p.batch, p.in_h, p.in_w, p.channels,
                           first, S, input_box))
      return cudaErrorInvalidValue;
  }
  if (!encode_pixels<T>(&grad_map, p.grad_output, p.batch, p.out_h, p.out_w, p.channels, grad_box))
    return cudaErrorInvalidValue;

  const auto function = kernel<Traits>;
  const cudaError_t status = allow_shared_memory(function, device);
  if (status != cudaSuccess) return status;
  function<<<static_cast<unsigned>(a.slices * a.shares), cut.threads(), cut.shared_bytes(),
             stream>>>(input_maps, grad_map, a, Sums<T>(p, a.shares));
  return finish_launch(p, a.shares, stream);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, const Device& device, cudaStream_t stream) {
  const Cut cut = choose_cut(p, device);
#define DWSWAP_CASE(K, S)                                   \
  if (p.kernel_h == K && p.stride_h == S) {                 \
    return launch<Traits<T, K, S>>(p, cut, device, stream); \
  }
  DWSWAP_CASE(5, 1)
  DWSWAP_CASE(5, 2)
  DWSWAP_CASE(7, 1)
  DWSWAP_CASE(7, 2)
#undef DWSWAP_CASE
  return cudaErrorInvalidValue;
}

}  // namespace diagonal_sums
}  // namespace dwswap
