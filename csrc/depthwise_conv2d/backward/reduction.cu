// Adds up the sums of the shares: see sums.h.
#include "common/dependent_launch.cuh"
#include "common/integer.h"
#include "common/sum.cuh"
#include "depthwise_conv2d/backward/sums.cuh"

namespace dwswap {
namespace {

constexpr int kLanes = 32;  // sums of a block
constexpr int kRows = 32;   // threads of a sum, which take the shares in turn

template <typename T>
__global__ void __launch_bounds__(kLanes* kRows)
    reduction_kernel(const accumulator_t<T>* shares, int64_t count, int64_t channels,
                     int64_t first_value, int64_t end_value, const Gradients<T> gradients) {
  __shared__ sum_t<T> partial[kRows][kLanes + 1];
  const int lane = threadIdx.x, row = threadIdx.y;
  const int64_t sums = (gradients.taps + 1) * channels;  // of a share
  const int64_t index = first_value * channels + static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  const bool mine = index < end_value * channels;
  sum_t<T> sum;
  await_previous_kernel();
  if (mine) {
#pragma unroll 4
    for (int64_t share = row; share < count; share += kRows) sum.add(shares[share * sums + index]);
  }
  partial[row][lane] = sum;
  __syncthreads();
  if (row != 0 || !mine) return;
#pragma unroll
  for (int i = 1; i < kRows; ++i) sum.add(partial[i][lane]);
  gradients.set(index % channels, index / channels, sum.value());
}

template <typename T>
cudaError_t launch(const GradientParams& p, int64_t shares, cudaStream_t stream) {
  const int64_t first = p.wants_weight ? 0 : p.taps();
  const int64_t end = p.wants_bias ? p.taps() + 1 : p.taps();
  const Gradients<T> gradients{static_cast<T*>(p.grad_weight), static_cast<T*>(p.grad_bias),
                               p.taps()};
  const auto blocks = static_cast<unsigned>(ceil_div((end - first) * p.out_channels(), kLanes));
  return launch_dependent(reduction_kernel<T>, blocks, dim3(kLanes, kRows), stream,
                          static_cast<const accumulator_t<T>*>(p.workspace), shares,
                          p.out_channels(), first, end, gradients);
}

}  // namespace

cudaError_t finish_launch(const GradientParams& p, int64_t shares, cudaStream_t stream) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess || shares == 1) return status;
  return visit_type(p.dtype, [&]<typename T>() { return launch<T>(p, shares, stream); });
}

}  // namespace dwswap
