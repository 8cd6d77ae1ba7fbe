// Launches that overlap the end of the kernel in front (programmatic dependent launch, sm_90 and
// later): a kernel of a microsecond spends as long on being launched.
#pragma once

#include <cuda_runtime.h>

#include "common/device.h"

namespace dwswap {

// Until the kernel in front has ended and what it wrote can be seen. Every thread calls it before
// its first access to global memory: what it reads may just have been written, and what it writes
// still be read.
__device__ __forceinline__ void wait_for_kernel_in_front() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_kernel_in_front().
template <typename... Parameters>
cudaError_t launch_early(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                         size_t shared, cudaStream_t stream, const Parameters&... arguments) {
  constexpr int kFirstMajor = 9;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads;
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = current_device().major >= kFirstMajor && getenv("DWSWAP_NO_PDL") == nullptr ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace dwswap
