// Launches the squeeze_excitation kernels of one element type.
#pragma once

#include "common/integer.h"
#include "squeeze_excitation/kernels.cuh"

namespace dwswap {

template <typename T, int V, bool kChannelsLast>
cudaError_t launch_pair(const SqueezeExcitationParams& params, const ExcitationCut& cut,
                        cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(cut.parts()),
                  static_cast<unsigned>(ceil_div(params.batch, cut.samples)));
  constexpr int kThreads = ExcitationTile::kThreads;
  squeeze_kernel<T, V, kChannelsLast><<<grid, kThreads, 0, stream>>>(params, cut);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  excite_kernel<T, V, kChannelsLast><<<grid, kThreads, 0, stream>>>(params, cut);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_squeeze_excitation_of(const SqueezeExcitationParams& params,
                                         const ExcitationCut& cut, cudaStream_t stream) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  if (params.layout == Layout::kChannelsLast) {
    return cut.wide ? launch_pair<T, kWide, true>(params, cut, stream)
                    : launch_pair<T, 1, true>(params, cut, stream);
  }
  return cut.wide ? launch_pair<T, kWide, false>(params, cut, stream)
                  : launch_pair<T, 1, false>(params, cut, stream);
}

}  // namespace dwswap
