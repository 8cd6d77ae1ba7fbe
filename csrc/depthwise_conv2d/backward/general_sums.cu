// The gradients of weight and bias, right for everything: any kernel size, stride, dilation,
// padding and multiplier.
//   grad_weight[k] = sum over n and o of grad_output[o] input[stride o + dilation k - padding]
//   grad_bias      = sum over n and o of grad_output[o]
// A block has kValues of these sums over a share of the pixels: of one channel in NCHW, where the
// threads run over the pixels, and of kLanes channels in channels_last, where lanes run over them.
#include <algorithm>
#include <limits>

#include "common/device.h"
#include "common/integer.h"
#include "common/sum.cuh"
#include "depthwise_conv2d/backward/sums.cuh"

namespace dwswap {
namespace {

constexpr int kLanes = 32;
constexpr int kRows = 8;
constexpr int kValues = 4;

struct Cut {
  int64_t columns;      // blocks of a share along the channels
  int64_t first_value;  // taps() is the sum of the bias
  int64_t values, chunks;
  int64_t pixels, shares, share;  // pixels of grad_output, of all images
};

// How many shares of `units` make `blocks` blocks of `columns` columns of them: no share is empty.
int64_t shares_of(int64_t units, int64_t blocks, int64_t columns) {
  const int64_t wanted = blocks / columns;
  const int64_t shares = wanted < 1 ? 1 : wanted < units ? wanted : units;
  return ceil_div(units, ceil_div(units, shares));
}

Cut choose_cut(const GradientParams& p) {
  constexpr int64_t kBlocks = 16;  // per multiprocessor
  constexpr int64_t kLeast = 256;  // pixels of a share
  constexpr int64_t kMostShares = 1024;
  Cut cut{};
  cut.columns = p.channels_last() ? ceil_div(p.out_channels(), kLanes) : p.out_channels();
  cut.first_value = p.wants_weight ? 0 : p.taps();
  cut.values = (p.wants_bias ? p.taps() + 1 : p.taps()) - cut.first_value;
  cut.chunks = ceil_div(cut.values, kValues);
  cut.pixels = p.batch * p.out_h * p.out_w;
  const int64_t units = std::min(ceil_div(cut.pixels, kLeast), kMostShares);
  cut.shares =
      shares_of(units, kBlocks * current_device().multiprocessors, cut.columns * cut.chunks);
  cut.share = ceil_div(cut.pixels, cut.shares);
  return cut;
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kLanes* kRows)
    general_sums_kernel(const GradientParams p, const Cut cut, const Sums<T> target) {
  using A = accumulator_t<T>;
  __shared__ sum_t<T> partial[kRows][kLanes][kValues];
  const int lane = threadIdx.x, row = threadIdx.y;
  const bool channels_last = p.channels_last();
  const int64_t out_channels = p.channels * p.multiplier;
  // Their product with the shares is the number of blocks.
  const auto columns = static_cast<uint32_t>(cut.columns);
  const auto chunks = static_cast<uint32_t>(cut.chunks);
  const int64_t column = blockIdx.x % columns;
  const uint32_t rest = blockIdx.x / columns;
  const int64_t first_value = cut.first_value + static_cast<int64_t>(rest % chunks) * kValues;
  const int64_t share = rest / chunks;
  const int64_t channel = channels_last ? column * kLanes + lane : column;
  const auto kernel_w = static_cast<Index>(p.kernel_w);
  const auto out_h = static_cast<Index>(p.out_h), out_w = static_cast<Index>(p.out_w);

  sum_t<T> sums[kValues];
  if (channel < out_channels) {
    // The first pixel of each tap, without the steps of the stride.
    Index top[kValues], left[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const Index tap = static_cast<Index>(first_value) + i;
      top[i] = tap / kernel_w * static_cast<Index>(p.dilation_h) - static_cast<Index>(p.padding_h);
      left[i] = tap % kernel_w * static_cast<Index>(p.dilation_w) - static_cast<Index>(p.padding_w);
    }
    const auto* grad = static_cast<const T*>(p.grad_output) + channel * p.out_stride.c;
    const auto* input = static_cast<const T*>(p.input) + channel / p.multiplier * p.in_stride.c;
    const Index end = static_cast<Index>(
        cut.pixels < (share + 1) * cut.share ? cut.pixels : (share + 1) * cut.share);
    const Index step = channels_last ? kRows : kLanes * kRows;
    for (Index i =
             static_cast<Index>(share * cut.share) + (channels_last ? row : row * kLanes + lane);
         i < end; i += step) {
      const Index ow = i % out_w, oh = i / out_w % out_h;
      const int64_t n = i / out_w / out_h;
      const A g = widen(grad[n * p.out_stride.n + static_cast<int64_t>(oh) * p.out_stride.h +
                             static_cast<int64_t>(ow) * p.out_stride.w]);
      const T* image = input + n * p.in_stride.n;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (first_value + v == p.taps()) sums[v].add(g);
        if (first_value + v >= p.taps()) continue;
        const Index ih = oh * static_cast<Index>(p.stride_h) + top[v];
        const Index iw = ow * static_cast<Index>(p.stride_w) + left[v];
        if (ih < 0 || ih >= p.in_h || iw < 0 || iw >= p.in_w) continue;
        sums[v].add(g * widen(image[static_cast<int64_t>(ih) * p.in_stride.h +
                                    static_cast<int64_t>(iw) * p.in_stride.w]));
      }
    }
  }
  if (!channels_last) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) sums[v].add(sums[v].from_lane(offset));
    }
  }
#pragma unroll
  for (int v = 0; v < kValues; ++v) partial[row][lane][v] = sums[v];
  __syncthreads();
  // A thread per sum adds up those of the rows.
  const int index = row * kLanes + lane;
  const int v = index % kValues, own = index / kValues;
  if (index >= (channels_last ? kLanes * kValues : kValues)) return;
  const int64_t own_channel = channels_last ? column * kLanes + own : column;
  if (first_value + v >= cut.first_value + cut.values || own_channel >= out_channels) return;
  sum_t<T> sum;
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum.add(partial[r][own][v]);
  target.set(share, own_channel, first_value + v, sum.value());
}

template <typename T>
cudaError_t launch(const GradientParams& p, cudaStream_t stream) {
  const Cut cut = choose_cut(p);
  const int64_t blocks = cut.columns * cut.chunks * cut.shares;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const Sums<T> target(p, cut.shares);
  const dim3 threads(kLanes, kRows);
  const auto grid = static_cast<unsigned>(blocks);
  // 32-bit indices must hold: pixels one step past the end, taps, and coordinates of the padded
  // image.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - 2 * kLanes * kRows;
  if (cut.pixels <= kLimit && p.taps() <= kLimit && p.in_h + 2 * p.padding_h <= kLimit &&
      p.in_w + 2 * p.padding_w <= kLimit) {
    general_sums_kernel<T, int32_t><<<grid, threads, 0, stream>>>(p, cut, target);
  } else {
    general_sums_kernel<T, int64_t><<<grid, threads, 0, stream>>>(p, cut, target);
  }
  return finish_launch(p, cut.shares, stream);
}

}  // namespace

int64_t general_sums_workspace_bytes(const GradientParams& p) {
  return sums_bytes(p, choose_cut(p).shares);
}

cudaError_t launch_general_sums(const GradientParams& p, cudaStream_t stream) {
  return visit_type(p.dtype, [&]<typename T>() { return launch<T>(p, stream); });
}

}  // namespace dwswap
