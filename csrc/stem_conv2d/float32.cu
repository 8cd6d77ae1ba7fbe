// The first layer of a network in float32: 3 x 3 taps on 3 channels, stride 2, padding 1.
//
// The tensor cores would round to TF32. 27 multiply-adds for each element of the output take less
// time than to write it.
//
// A thread has 8 channels of kPixels outputs. A warp's threads have all channels of neighbouring
// outputs; what they read of the input, 6 elements apart, is in different banks up to 16 of them.
#include "common/numeric.cuh"
#include "stem_conv2d/cut.h"
#include "stem_conv2d/fetch.cuh"
#include "stem_conv2d/launch.h"

namespace dwswap {
namespace stem {
namespace {

constexpr int kPixels = 7;  // divides the sides of what networks get
constexpr int kOwn = 8;     // channels of a thread, in two vectors
constexpr int kVector = 4;  // elements, 16 bytes

constexpr int kTapPitch = kMostChannels + kVector;  // neighbouring taps are in other banks
constexpr int kRowTaps = kTaps / 3;

// Of a multiprocessor. From sm_100 on two sums of a pair of registers are added to at once, which
// takes a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif

// taps[t][k]: tap t = 9 r + 3 s + c of channel k; behind them its bias.
__device__ __forceinline__ void load_taps(const Arguments& a, float* taps) {
  const auto* const weight = static_cast<const float*>(a.weight);
  for (int i = static_cast<int>(threadIdx.x); i < kTaps * a.channels; i += kThreads) {
    const int channel = i / kTaps, tap = i % kTaps, row = tap / kRowTaps, element = tap % kRowTaps;
    const int place = row * a.weight_row + element / kInputChannels * a.weight_column +
                      element % kInputChannels * a.weight_plane;
    taps[tap * kTapPitch + channel] = __ldg(weight + channel * kTaps + place);
  }
  const auto* const bias = static_cast<const float*>(a.bias);
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread < a.channels)
    taps[kTaps * kTapPitch + thread] = bias != nullptr ? __ldg(bias + thread) : 0.0f;
}

template <bool CLAMPS>
__device__ __forceinline__ void finish(float (&x)[kVector], Activation activation) {
  if constexpr (CLAMPS) {
    const float low = low_of(activation), high = high_of(activation);
#pragma unroll
    for (float& value : x) value = clamp(value, low, high);
  } else {
    activate(x, activation);
  }
}

template <bool CLAMPS>
__global__ void __launch_bounds__(kThreads, kBlocks)
    stem_conv2d_float_kernel(const __grid_constant__ Arguments a) {
  __shared__ __align__(kVectorBytes) uint32_t rows[kInputRows * kPitch];
  __shared__ __align__(kVectorBytes) float taps[(kTaps + 1) * kTapPitch];
  const Unit u = unit_at(a, blockIdx.x);
  load_taps(a, taps);
  fetch<float>(a, u, rows);
  __syncthreads();

  const int groups = a.channels / kOwn, lanes = kThreads / groups;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread / groups, channel = thread % groups * kVector, half = a.channels / 2;
  if (lane >= lanes) return;
  const int width = min(a.tiles * kTile, a.out_w - u.column);
  const int count = width * min(a.rows, a.out_h - u.row);
  auto* const output = static_cast<float*>(a.output) +
                       ((u.image * a.out_h + u.row) * a.out_w + u.column) * a.channels + channel;
  for (int first = lane; first < count; first += lanes * kPixels) {
    const auto row_of = [&](int pixel) {
      return static_cast<int>(static_cast<unsigned>(pixel) / static_cast<unsigned>(width));
    };
    int windows[kPixels];  // in shared memory
    float sums[kPixels][kOwn];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int pixel = min(first + p * lanes, count - 1), row = row_of(pixel);
      windows[p] = 2 * row * kPitch + 2 * kInputChannels * (pixel - row * width) + kFirstElement;
    }
    float start[2][kVector];
#pragma unroll
    for (int i = 0; i < 2; ++i) load(taps + kTaps * kTapPitch + channel + i * half, start[i]);
#pragma unroll
    for (int i = 0; i < kPixels * kOwn; ++i)
      sums[i / kOwn][i % kOwn] = start[i % kOwn / kVector][i % kVector];
#pragma unroll 1
    for (int row = 0; row < kTaps / kRowTaps; ++row) {
      const float* const row_taps = taps + row * kRowTaps * kTapPitch + channel;
#pragma unroll
      for (int tap = 0; tap < kRowTaps; ++tap) {
        float w[2][kVector];
#pragma unroll
        for (int i = 0; i < 2; ++i) load(row_taps + tap * kTapPitch + i * half, w[i]);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const float x = __uint_as_float(rows[windows[p] + tap]);
#pragma unroll
          for (int i = 0; i < kOwn; ++i) sums[p][i] += x * w[i / kVector][i % kVector];
        }
      }
#pragma unroll
      for (int& window : windows) window += kPitch;
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int pixel = first + p * lanes, row = row_of(pixel);
      if (pixel >= count) break;
      const int64_t place = static_cast<int64_t>(row) * a.out_w + (pixel - row * width);
      float* const target = output + place * a.channels;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float y[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) y[j] = sums[p][i * kVector + j];
        finish<CLAMPS>(y, a.activation);
        store(target + i * half, y);
      }
    }
  }
}

}  // namespace

template <>
cudaError_t launch_typed<float>(const StemConv2dParams& p, const Device& device,
                                cudaStream_t stream) {
  const Cut cut = choose_cut(p, device.multiprocessors);
  const Arguments a = arguments_of<float>(p, cut);
  const auto kernel = p.activation <= Activation::kRelu6 ? stem_conv2d_float_kernel<true>
                                                         : stem_conv2d_float_kernel<false>;
  kernel<<<static_cast<unsigned>(cut.units), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace stem
}  // namespace dwswap
