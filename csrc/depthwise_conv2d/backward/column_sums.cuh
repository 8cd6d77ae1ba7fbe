// channels_last, the gradients of weight and bias, 3 x 3, stride 1 and 2, on sm_90.
//
// A block keeps some channels. It walks down the rows of one strip of columns after another, a
// stage at a time, while the copy engine fetches the stages behind: rows of grad_output, and those
// of the input that they see. What lies outside the images arrives as zeros.
//
// A thread owns two neighbouring channels of kColumns columns. It loads each row of input once,
// and multiplies it by the kSeen rows of grad_output whose windows hold that row, which wait in
// registers. In the end the threads of a block that have the same channels add up their sums, in
// order.
//
// An infinity or a NaN reaches the sums of its own channel alone.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/sum.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/backward/column_sums_cut.h"
#include "depthwise_conv2d/backward/strips.cuh"
#include "depthwise_conv2d/backward/sums.cuh"
#include "depthwise_conv2d/tensor_map.h"

namespace dwswap {
namespace column_sums {

template <typename T_, int STRIDE_>
struct Traits {
  using T = T_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kSeen = seen_rows(STRIDE_);
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + kKernel;
  static constexpr int kTaps = kKernel * kKernel;
  // Elements of half precision are rounded by more than a long sum in float32 is off. Those of
  // float32 are added up over so many stages, and these sums in turn.
  static constexpr bool kFolds = sizeof(T_) == 4;
  static constexpr int kFoldStages = 4;
};

struct Arguments {
  int channels, padding_w;
  Strips strips;
  int pairs, groups, slots;
  int slices, shares;                                // of channels, and of strips
  int pixel_bytes, input_row_bytes, grad_row_bytes;  // of a stage
  uint32_t stage_bytes, grad_offset, box_bytes;
  Divisor by_slices, by_pairs, by_groups;
  bool wants_bias;
};

template <typename Traits>
__global__ void __launch_bounds__(kMaxThreads, kBlocks)
    kernel(const __grid_constant__ CUtensorMap input_map,
           const __grid_constant__ CUtensorMap grad_map, const Arguments a,
           const Sums<typename Traits::T> target) {
#if DWSWAP_BULK_COPIES
  using T = typename Traits::T;
  constexpr int K = kKernel, S = Traits::kStride, SEEN = Traits::kSeen, TAPS = Traits::kTaps;
  constexpr int IN_COLUMNS = Traits::kInputColumns;
  extern __shared__ __align__(kAlignment) unsigned char shared[];
  auto* const full = reinterpret_cast<uint64_t*>(shared + a.slots * a.stage_bytes);

  uint32_t slice, pair, group;
  const int share = static_cast<int>(a.by_slices.divide(blockIdx.x, &slice));
  const int tile_channels = 2 * a.pairs, first_channel = static_cast<int>(slice) * tile_channels;

  // The next stage that thread 0 asks for. The strip is found anew each time: registers are few.
  int ahead_index = share, ahead_stage = 0;
  const auto fetch = [&](int slot) {
    if (ahead_index >= a.strips.count) return;
    const Strip ahead = strip_at<S, SEEN>(a.strips, ahead_index, SEEN);
    const int row = ahead.row + ahead_stage * SEEN;
    unsigned char* const stage = shared + slot * a.stage_bytes;
    barrier_expect(&full[slot], a.box_bytes);
    copy_box(stage, &input_map, &full[slot], first_channel, ahead.column * S - a.padding_w,
             row * S - a.strips.padding_h, ahead.image);
    copy_box(stage + a.grad_offset, &grad_map, &full[slot], first_channel, ahead.column, row,
             ahead.image);
    if (++ahead_stage < ahead.stages) return;
    ahead_stage = 0, ahead_index += a.shares;
  };
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < a.slots; ++slot) barrier_init(&full[slot]);
    for (int slot = 0; slot < a.slots; ++slot) fetch(slot);
  }

  const auto place = static_cast<int>(a.by_pairs.divide(threadIdx.x, &pair));
  const auto image = static_cast<int>(a.by_groups.divide(place, &group));
  // Threads without work stay for the barriers.
  const bool busy = image < a.strips.images;
  const int column = static_cast<int>(group) * kColumns, c = 2 * static_cast<int>(pair);
  const int word = c * static_cast<int>(sizeof(T));
  const int input_place = image * SEEN * S * a.input_row_bytes + column * S * a.pixel_bytes + word;
  const int grad_place =
      a.grad_offset + image * SEEN * a.grad_row_bytes + column * a.pixel_bytes + word;
  // Of a pixel, so many from the one at `place`. In bytes, so that the compiler adds a register.
  const auto load_pixel = [&](const unsigned char* place, int pixel, float (&x)[2]) {
    load(reinterpret_cast<const T*>(place + pixel * a.pixel_bytes), x);
  };
  __syncthreads();

  // Tap by tap, then the sum of grad_output.
  float sums[TAPS + 1][2] = {}, totals[Traits::kFolds ? TAPS : 1][2] = {};
  sum_t<T> bias[2];
  const auto fold = [&] {
    if constexpr (Traits::kFolds) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int i = 0; i < TAPS; ++i) totals[i][v] += sums[i][v], sums[i][v] = 0.0f;
        if (a.wants_bias) bias[v].add(sums[TAPS][v]), sums[TAPS][v] = 0.0f;
      }
    }
  };
  float grad[SEEN][kColumns][2];  // row q is grad[q % SEEN]
  int slot = 0, unfolded = 0;
  uint32_t parity = 0;
  for (int item = share; item < a.strips.count; item += a.shares) {
    const Strip s = strip_at<S, SEEN>(a.strips, item, SEEN);
#pragma unroll
    for (int i = 0; i < SEEN * kColumns; ++i)
      grad[i / kColumns][i % kColumns][0] = grad[i / kColumns][i % kColumns][1] = 0.0f;
    int rows_left = s.rows, ih = s.row * S - a.strips.padding_h;
    for (int stage = 0; stage < s.stages; ++stage) {
      barrier_wait(&full[slot], parity);
      const unsigned char* input_row = shared + slot * a.stage_bytes + input_place;
      const unsigned char* grad_row = shared + slot * a.stage_bytes + grad_place;
      if (busy) {
#pragma unroll
        for (int step = 0; step < SEEN; ++step) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            float (&g)[2] = grad[step][i];
            g[0] = g[1] = 0.0f;
            if (rows_left > step) load_pixel(grad_row, i, g);
          }
          if (a.wants_bias) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
              sums[TAPS][0] += grad[step][i][0], sums[TAPS][1] += grad[step][i][1];
          }
#pragma unroll
          for (int e = 0; e < S; ++e) {
            if (static_cast<unsigned>(ih + step * S + e) < static_cast<unsigned>(a.strips.in_h)) {
              // It is row e of the windows of the newest row of grad_output, row e + S of those of
              // the one before, and so on.
#pragma unroll
              for (int i = 0; i < IN_COLUMNS; ++i) {
                float x[2];
                load_pixel(input_row, i, x);
#pragma unroll
                for (int own = 0; own < kColumns; ++own) {
                  const int kw = i - own * S;
                  if (kw < 0 || kw >= K) continue;
#pragma unroll
                  for (int age = 0; age < SEEN; ++age) {
                    const int kh = e + S * age;
                    if (kh >= K) continue;
                    const float (&g)[2] = grad[(step - age + SEEN) % SEEN][own];
                    sums[kh * K + kw][0] += x[0] * g[0], sums[kh * K + kw][1] += x[1] * g[1];
                  }
                }
              }
            }
            input_row += a.input_row_bytes;
          }
          grad_row += a.grad_row_bytes;
        }
      }
      rows_left -= SEEN, ih += SEEN * S;
      if (Traits::kFolds && ++unfolded == Traits::kFoldStages) fold(), unfolded = 0;
      __syncthreads();
      if (threadIdx.x == 0) fetch(slot);
      if (++slot == a.slots) slot = 0, parity ^= 1;
    }
  }
  fold();

  release_next_kernel();
  // [sum][place][channel]
  auto* const partials = reinterpret_cast<float*>(shared);
  const int places = a.groups * a.strips.images;
  if (busy) {
#pragma unroll
    for (int i = 0; i <= TAPS; ++i) {
      float* const mine = partials + (i * places + place) * tile_channels + c;
#pragma unroll
      for (int v = 0; v < 2; ++v)
        mine[v] = !Traits::kFolds ? sums[i][v] : i == TAPS ? bias[v].value() : totals[i][v];
    }
  }
  __syncthreads();
  const int used = min(tile_channels, a.channels - first_channel);
  for (int i = threadIdx.x; i < (TAPS + 1) * used; i += blockDim.x) {
    const int value = i / used, channel = i % used;
    const float* const first = partials + value * places * tile_channels + channel;
    sum_t<T> sum;
    for (int other = 0; other < places; ++other) sum.add(first[other * tile_channels]);
    target.set(share, first_channel + channel, value, sum.value());
  }
#else
  __trap();  // the host chose it for an image of sm_90
#endif
}

template <typename Traits>
cudaError_t launch(const GradientParams& p, const Cut& cut, const Device& device,
                   cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int S = Traits::kStride, SEEN = Traits::kSeen;
  Arguments a{};
  a.channels = static_cast<int>(p.channels), a.padding_w = static_cast<int>(p.padding_w);
  a.strips = Strips(p, cut.rows, cut.columns(), cut.images);
  a.pairs = cut.pairs, a.groups = cut.groups, a.slots = cut.slots;
  a.slices = static_cast<int>(ceil_div(p.channels, 2 * cut.pairs)), a.shares = cut.shares;
  a.pixel_bytes = cut.pixel_bytes();
  a.input_row_bytes = cut.input_columns() * a.pixel_bytes;
  a.grad_row_bytes = cut.columns() * a.pixel_bytes;
  a.stage_bytes = cut.stage_bytes(), a.grad_offset = cut.grad_offset();
  a.box_bytes = cut.input_bytes() + cut.grad_bytes();
  a.by_slices = Divisor(static_cast<uint32_t>(a.slices));
  a.by_pairs = Divisor(static_cast<uint32_t>(cut.pairs));
  a.by_groups = Divisor(static_cast<uint32_t>(cut.groups));
  a.wants_bias = p.wants_bias;

  // The cache reads little beside a block's channels.
  const Box grad_box{.channels = 2 * cut.pairs,
                     .columns = cut.columns(),
                     .rows = SEEN,
                     .images = cut.images,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B};
  Box input_box = grad_box;
  input_box.columns = cut.input_columns(), input_box.rows = SEEN * S;
  CUtensorMap input_map{}, grad_map{};
  if (!encode_input<T>(&input_map, p, input_box)) return cudaErrorInvalidValue;
  if (!encode_pixels<T>(&grad_map, p.grad_output, p.batch, p.out_h, p.out_w, p.channels, grad_box))
    return cudaErrorInvalidValue;

  const auto function = kernel<Traits>;
  const cudaError_t status = allow_shared_memory(function, device);
  if (status != cudaSuccess) return status;
  function<<<static_cast<unsigned>(a.slices * a.shares), cut.threads(), cut.shared_bytes(),
             stream>>>(input_map, grad_map, a, Sums<T>(p, a.shares));
  return finish_launch(p, a.shares, stream);
}

// One file per element type instantiates this.
template <typename T>
cudaError_t launch_typed(const GradientParams& p, const Device& device, cudaStream_t stream) {
  const Cut cut = choose_cut(p, sizeof(T), device);
  if (p.stride_h == 1) return launch<Traits<T, 1>>(p, cut, device, stream);
  return launch<Traits<T, 2>>(p, cut, device, stream);
}

#define DWSWAP_LAUNCH_TYPED(T) \
  cudaError_t launch_typed<T>(const GradientParams&, const Device&, cudaStream_t)

}  // namespace column_sums
}  // namespace dwswap
