// Contiguous pieces of global memory to shared memory and back by 16-byte accesses, whatever the
// alignment of the piece. sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dwswap {

constexpr int kVectorBytes = 16;

// Elements between the 16-byte boundary at or below `pointer` and `pointer`.
template <typename T>
__device__ __forceinline__ int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes / sizeof(T));
}

// Starts copying source[0, count) to target[m, m + count), m = misalignment(source); target is
// aligned to 16 bytes. All threads of the block call it; wait_for_copies() and a barrier end it.
// Elements before the piece, back to the boundary, are read too: the tensor that holds the piece
// must be aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void start_copy(T* target, const T* source, int count) {
  const int skipped = misalignment(source);
  const auto* first = reinterpret_cast<const char*>(source - skipped);
  const auto start = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  const int bytes = (skipped + count) * static_cast<int>(sizeof(T));
  for (int at = threadIdx.x * kVectorBytes; at < bytes; at += blockDim.x * kVectorBytes) {
    // The rest of the last vector is filled with zeros and not read.
    const int valid = min(kVectorBytes, bytes - at);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(start + at),
                 "l"(first + at), "r"(valid)
                 : "memory");
  }
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// target[0, count) = source[m, m + count), m = misalignment(target); source is aligned to 16 bytes.
// All threads of the block call it.
template <typename T>
__device__ __forceinline__ void copy_out(T* target, const T* source, int count) {
  constexpr int N = kVectorBytes / sizeof(T);
  const int skipped = misalignment(target);
  T* first = target - skipped;
  const int end = skipped + count;
  for (int at = threadIdx.x * N; at < end; at += blockDim.x * N) {
    if (at >= skipped && at + N <= end) {
      *reinterpret_cast<uint4*>(first + at) = *reinterpret_cast<const uint4*>(source + at);
    } else {
      for (int i = max(at, skipped); i < min(at + N, end); ++i) first[i] = source[i];
    }
  }
}

}  // namespace dwswap
