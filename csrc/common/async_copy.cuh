// Contiguous pieces of global memory by 16-byte accesses, whatever the alignment of the piece; and
// asynchronous copies (sm_80 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/numeric.cuh"

namespace dwswap {

constexpr int kVectorBytes = 16;

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

// Until all groups but the last `open` (0 or 1) that were committed have arrived.
__device__ __forceinline__ void wait_for_groups(int open) {
  if (open == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// N consecutive elements of a piece that ends at `end`; what lies behind the end is zero.
template <int N, typename T>
__device__ __forceinline__ Words<T, N> load_clipped(const T* source, const T* end) {
  if (source + N <= end) return load_words<N>(source);
  Words<T, N> words{};
  constexpr int BITS = 8 * sizeof(T), PER_WORD = 4 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    uint32_t bits = 0;
    if (source + i < end) {
      if constexpr (sizeof(T) == 4) {
        bits = *reinterpret_cast<const uint32_t*>(source + i);
      } else {
        bits = *reinterpret_cast<const uint16_t*>(source + i);
      }
    }
    words.data[i / PER_WORD] |= bits << (i % PER_WORD * BITS);
  }
  return words;
}

// N elements as float32, by 16-byte accesses.
template <int N>
__device__ __forceinline__ void store_wide(float* target, const float (&values)[N]) {
  static_assert(N % 4 == 0, "a 16-byte access holds four float32");
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float quad[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
    store(target + i, quad);
  }
}

}  // namespace dwswap
