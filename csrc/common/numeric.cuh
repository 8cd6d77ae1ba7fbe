// Element types, their accumulators, vector access, and division by a run-time constant.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.cuh"

namespace dwswap {

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(accumulator_t<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Last element first, where `reversed`.
template <int N>
__device__ __forceinline__ void reverse_where(bool reversed, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float first = x[i], last = x[N - 1 - i];
    x[i] = reversed ? last : first;
    x[N - 1 - i] = reversed ? first : last;
  }
}

// N consecutive elements as the 32-bit registers that hold them. Copying a struct of elements would
// be compiled to an access per element.
template <typename T, int N>
struct Words {
  static constexpr int kBytes = sizeof(T) * N;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16,
                "the widths of one access");
  static constexpr int kWords = (kBytes + 3) / 4;
  uint32_t data[kWords];
};

template <int N, typename T>
__device__ __forceinline__ Words<T, N> load_words(const T* source) {
  if constexpr (Words<T, N>::kBytes == 16) {
    const uint4 word = *reinterpret_cast<const uint4*>(source);
    return {word.x, word.y, word.z, word.w};
  } else if constexpr (Words<T, N>::kBytes == 8) {
    const uint2 word = *reinterpret_cast<const uint2*>(source);
    return {word.x, word.y};
  } else if constexpr (Words<T, N>::kBytes == 4) {
    return {*reinterpret_cast<const uint32_t*>(source)};
  } else {
    return {*reinterpret_cast<const uint16_t*>(source)};
  }
}

// words = N elements, where `wanted`; else they stay. Written as C++, the compiler moves what it
// loaded to other registers, and waits for it there.
#define DWSWAP_LOAD_WHERE(NAME, LOAD)                                                      \
  template <int N, typename T>                                                             \
  __device__ __forceinline__ void NAME(bool wanted, const T* source, Words<T, N>& words) { \
    auto& data = words.data;                                                               \
    if constexpr (Words<T, N>::kBytes == 16) {                                             \
      asm volatile(                                                                        \
          "{\n"                                                                            \
          ".reg .pred wanted;\n"                                                           \
          "setp.ne.s32 wanted, %4, 0;\n"                                                   \
          "@wanted " LOAD                                                                  \
          ".v4.u32 {%0, %1, %2, %3}, [%5];\n"                                              \
          "}\n"                                                                            \
          : "+r"(data[0]), "+r"(data[1]), "+r"(data[2]), "+r"(data[3])                     \
          : "r"(static_cast<int>(wanted)), "l"(source));                                   \
    } else if constexpr (Words<T, N>::kBytes == 8) {                                       \
      asm volatile(                                                                        \
          "{\n"                                                                            \
          ".reg .pred wanted;\n"                                                           \
          "setp.ne.s32 wanted, %2, 0;\n"                                                   \
          "@wanted " LOAD                                                                  \
          ".v2.u32 {%0, %1}, [%3];\n"                                                      \
          "}\n"                                                                            \
          : "+r"(data[0]), "+r"(data[1])                                                   \
          : "r"(static_cast<int>(wanted)), "l"(source));                                   \
    } else if constexpr (Words<T, N>::kBytes == 4) {                                       \
      asm volatile(                                                                        \
          "{\n"                                                                            \
          ".reg .pred wanted;\n"                                                           \
          "setp.ne.s32 wanted, %1, 0;\n"                                                   \
          "@wanted " LOAD                                                                  \
          ".u32 %0, [%2];\n"                                                               \
          "}\n"                                                                            \
          : "+r"(data[0])                                                                  \
          : "r"(static_cast<int>(wanted)), "l"(source));                                   \
    } else {                                                                               \
      asm volatile(                                                                        \
          "{\n"                                                                            \
          ".reg .pred wanted;\n"                                                           \
          "setp.ne.s32 wanted, %1, 0;\n"                                                   \
          "@wanted " LOAD                                                                  \
          ".u16 %0, [%2];\n"                                                               \
          "}\n"                                                                            \
          : "+r"(data[0])                                                                  \
          : "r"(static_cast<int>(wanted)), "l"(source));                                   \
    }                                                                                      \
  }
DWSWAP_LOAD_WHERE(load_where, "ld.global.nc")
// In front of the next barrier, behind which the compiler moves the other kind.
DWSWAP_LOAD_WHERE(load_where_now, "ld.global")
#undef DWSWAP_LOAD_WHERE

template <int N, typename T>
__device__ __forceinline__ void store_words(T* target, const Words<T, N>& words) {
  if constexpr (Words<T, N>::kBytes == 16) {
    *reinterpret_cast<uint4*>(target) = {words.data[0], words.data[1], words.data[2],
                                         words.data[3]};
  } else if constexpr (Words<T, N>::kBytes == 8) {
    *reinterpret_cast<uint2*>(target) = {words.data[0], words.data[1]};
  } else if constexpr (Words<T, N>::kBytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = words.data[0];
  } else {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(words.data[0]);
  }
}

template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t word);
template <>
__device__ __forceinline__ float2 widen_pair<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ __forceinline__ float2 widen_pair<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <int N, typename T>
__device__ __forceinline__ void widen_all(const Words<T, N>& source, float (&target)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = __uint_as_float(source.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = widen_pair<T>(source.data[i / 2]);
      target[i] = pair.x;
      if constexpr (N > 1) target[i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ float widen(const Words<T, 1>& source) {
  float target[1];
  widen_all(source, target);
  return target[0];
}

template <int N, typename T>
__device__ __forceinline__ void load(const T* source, float (&target)[N]) {
  widen_all(load_words<N>(source), target);
}

template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrow_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T, int N>
__device__ __forceinline__ Words<T, N> narrow_all(const float (&source)[N]) {
  Words<T, N> words;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) words.data[i] = __float_as_uint(source[i]);
  } else if constexpr (N == 1) {
    words.data[0] = narrow_pair<T>(source[0], 0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) words.data[i / 2] = narrow_pair<T>(source[i], source[i + 1]);
  }
  return words;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* target, const float (&source)[N]) {
  store_words<N>(target, narrow_all<T>(source));
}

// The larger, the smaller and the sum of two words, element by element; NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t maximum_word(uint32_t x, uint32_t y);
template <typename T>
__device__ __forceinline__ uint32_t minimum_word(uint32_t x, uint32_t y);
#define DWSWAP_WORD_FUNCTION(NAME, T, INSTRUCTION)                      \
  template <>                                                           \
  __device__ __forceinline__ uint32_t NAME<T>(uint32_t x, uint32_t y) { \
    uint32_t result;                                                    \
    asm(INSTRUCTION " %0, %1, %2;" : "=r"(result) : "r"(x), "r"(y));    \
    return result;                                                      \
  }
DWSWAP_WORD_FUNCTION(maximum_word, __half, "max.NaN.f16x2")
DWSWAP_WORD_FUNCTION(minimum_word, __half, "min.NaN.f16x2")
DWSWAP_WORD_FUNCTION(maximum_word, __nv_bfloat16, "max.NaN.bf16x2")
DWSWAP_WORD_FUNCTION(minimum_word, __nv_bfloat16, "min.NaN.bf16x2")
#undef DWSWAP_WORD_FUNCTION
template <>
__device__ __forceinline__ uint32_t maximum_word<float>(uint32_t x, uint32_t y) {
  return __float_as_uint(maximum(__uint_as_float(x), __uint_as_float(y)));
}
template <>
__device__ __forceinline__ uint32_t minimum_word<float>(uint32_t x, uint32_t y) {
  return __float_as_uint(minimum(__uint_as_float(x), __uint_as_float(y)));
}

template <typename T>
__device__ __forceinline__ uint32_t sum_word(uint32_t x, uint32_t y);
template <>
__device__ __forceinline__ uint32_t sum_word<__half>(uint32_t x, uint32_t y) {
  const __half2 result =
      __hadd2_rn(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const uint32_t*>(&result);
}
template <>
__device__ __forceinline__ uint32_t sum_word<__nv_bfloat16>(uint32_t x, uint32_t y) {
  const __nv_bfloat162 result = __hadd2_rn(*reinterpret_cast<const __nv_bfloat162*>(&x),
                                           *reinterpret_cast<const __nv_bfloat162*>(&y));
  return *reinterpret_cast<const uint32_t*>(&result);
}
template <>
__device__ __forceinline__ uint32_t sum_word<float>(uint32_t x, uint32_t y) {
  return __float_as_uint(__uint_as_float(x) + __uint_as_float(y));
}

// Division of n < 2^31 by a divisor that is fixed per launch: a multiplication and a shift
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  // n -> n / value; *remainder = n % value.
  __device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t* remainder) const {
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
    *remainder = n - quotient * value;
    return quotient;
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    uint32_t remainder;
    return divide(n, &remainder);
  }
};

}  // namespace dwswap
