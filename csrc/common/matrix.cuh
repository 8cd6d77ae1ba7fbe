// Matrix instructions on half-precision fragments (sm_80 and later), with the layouts of the PTX
// manual, "Matrix fragments for mma.m16n8k16".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dwswap {

// Four 8 x 8 matrices of 16-bit elements; lane i gives the shared-memory address of row
// i % 8 of matrix i / 8, aligned to 16 bytes.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// The same, each of them transposed: lane 4 i + j gets the elements of column i in rows 2 j and
// 2 j + 1.
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// Two of them: the addresses of lanes 16 to 31 do not count.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&x)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(address)
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The way back, in the same layout.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(x[0]),
               "r"(x[1])
               : "memory");
}
#endif

// The transpose of an 8 x 8 matrix of 16-bit elements, of which lane 4 i + j has the elements 2 j
// and 2 j + 1 of row i.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two neighbouring elements of a fragment that are 1.
template <typename T>
constexpr uint32_t kOnes = 0x3c003c00;
template <>
inline constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80;

// sums += a b: a is 16 x 16 by rows, b 16 x 8 by columns, sums 16 x 8 in float32.
template <typename T>
__device__ __forceinline__ void multiply_add(float* sums, const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
// The same with a of 16 x 8, b of 8 x 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float* sums, const uint32_t (&a)[2], uint32_t b);
#define DWSWAP_MULTIPLY_ADD(T, NAME)                                                   \
  template <>                                                                          \
  __device__ __forceinline__ void multiply_add<T>(float* sums, const uint32_t (&a)[4], \
                                                  const uint32_t (&b)[2]) {            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                         \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }                                                                                    \
  template <>                                                                          \
  __device__ __forceinline__ void multiply_add<T>(float* sums, const uint32_t (&a)[2], \
                                                  uint32_t b) {                        \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                          \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                     \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
        : "r"(a[0]), "r"(a[1]), "r"(b));                                               \
  }
DWSWAP_MULTIPLY_ADD(__half, "f16")
DWSWAP_MULTIPLY_ADD(__nv_bfloat16, "bf16")
#undef DWSWAP_MULTIPLY_ADD

}  // namespace dwswap
