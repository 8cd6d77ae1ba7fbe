// What the launch choice asks of a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <string_view>
#include <vector>

namespace dwswap {

// DWSWAP_PORTABLE=1 in the environment keeps to what needs no more than sm_80.
inline bool portable_only() {
  const char* value = std::getenv("DWSWAP_PORTABLE");
  return value != nullptr && std::string_view(value) == "1";
}

struct Device {
  int major = 0;
  int multiprocessors = 1;
  int shared_per_multiprocessor = 100 * 1024;  // bytes
  int shared_per_block = 99 * 1024;            // of them, at most, where a kernel asks for so many
};

// Kernels with bulk copies are tested on sm_90.
inline bool uses_bulk_copies(const Device& device) { return device.major == 9 && !portable_only(); }

// Before a launch of `function`: lets its blocks have all shared memory, but for the bytes that it
// declares itself. Not what one cut needs: threads that launch at the same time must not lower each
// other's limit.
template <typename Function>
cudaError_t allow_shared_memory(Function* function, const Device& device, int static_bytes = 0) {
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device.shared_per_block - static_bytes);
}

// The current device; all are asked once.
inline Device current_device() {
  static const std::vector<Device> devices = [] {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::vector<Device> all(count);
    for (int i = 0; i < count; ++i) {
      Device& device = all[i];
      cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, i);
      cudaDeviceGetAttribute(&device.shared_per_multiprocessor,
                             cudaDevAttrMaxSharedMemoryPerMultiprocessor, i);
      cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
    }
    return all;
  }();
  int index = 0;
  const bool known =
      cudaGetDevice(&index) == cudaSuccess && index < static_cast<int>(devices.size());
  return known ? devices[index] : Device{};
}

}  // namespace dwswap
