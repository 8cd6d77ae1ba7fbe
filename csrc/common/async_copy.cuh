// Contiguous pieces of global memory by 16-byte accesses, whatever the alignment of the piece; and
// asynchronous copies (sm_80 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/data_type.h"
#include "common/numeric.cuh"

namespace dwswap {

// Elements between the 16-byte boundary at or below `pointer` and `pointer`.
template <typename T>
__device__ __forceinline__ int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes / sizeof(T));
}

// BYTES (4, 8 or 16) to shared memory; the bytes from `valid` on are filled with zeros and not
// read.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* target, const void* source, int valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(source),
                 "n"(BYTES), "r"(valid)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all groups but the last OPEN that were committed have arrived.
template <int OPEN>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

// `open`: 0 or 1.
__device__ __forceinline__ void wait_for_groups(int open) {
  if (open == 0) {
    wait_for_groups<0>();
  } else {
    wait_for_groups<1>();
  }
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace dwswap
