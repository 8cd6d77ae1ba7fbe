// Bulk copies, of boxes of a tensor (TMA) and of consecutive bytes, and the barrier they complete
// on: sm_90, where they are tested.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dwswap {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 100 == 9
#define DWSWAP_BULK_COPIES 1
#else
#define DWSWAP_BULK_COPIES 0
#endif

#if DWSWAP_BULK_COPIES

// A barrier whose phases take an arrival of every thread that issues copies, and their bytes.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The box of `map` at (c, w, h, n); what lies outside the tensor arrives as zeros.
__device__ __forceinline__ void copy_box(void* target, const CUtensorMap* map, uint64_t* barrier,
                                         int c, int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}

// `bytes` consecutive bytes; bytes and both addresses are multiples of 16.
__device__ __forceinline__ void copy_bytes(void* target, const void* source, uint32_t bytes,
                                           uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The way back, by one thread: `bytes` consecutive bytes of shared memory, aligned as above. They
// must have been written before, by threads that called fence_for_bulk_copies() before a barrier.
__device__ __forceinline__ void write_bytes(void* target, const void* source, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(target),
      "r"(shared_address(source)), "r"(bytes)
      : "memory");
}

// The same of a box at (c, w, h, n); what lies outside the tensor is not written.
__device__ __forceinline__ void write_box(const CUtensorMap* map, const void* source, int c, int w,
                                          int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(shared_address(source)), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}

__device__ __forceinline__ void fence_for_bulk_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Until shared memory that this thread's write_bytes() and write_box() read may be written again.
__device__ __forceinline__ void wait_for_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Until what they wrote can be seen.
__device__ __forceinline__ void wait_for_bulk_writes() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif

}  // namespace dwswap
