// Kernels that start while the one before them in the stream ends (sm_90 and later). On older GPUs
// they start behind it.
#pragma once

#include <cuda_runtime.h>

#include "common/device.h"

namespace dwswap {

// In the first kernel: no thread of it has much left to do. The next one may start, but sees what
// this one writes only behind await_previous_kernel().
__device__ __forceinline__ void release_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// In the second kernel, by all threads: until the first one has ended.
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Launches the second kernel. It calls await_previous_kernel() before it reads or writes anything.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                             cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads, config.stream = stream;
  config.attrs = &early;
  config.numAttrs = current_device().major >= 9 && !portable_only() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace dwswap
