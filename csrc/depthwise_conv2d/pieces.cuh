// Pieces of consecutive elements that begin and end anywhere, into and out of shared memory by
// accesses of 16 bytes.
#pragma once

#include "common/async_copy.cuh"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/tma.cuh"

namespace dwswap {

#if DWSWAP_BULK_COPIES

// Starts the copy of `count` elements to stage[m, m + count), m = misalignment(source), and arrives
// at `barrier`; by one thread. Elements before the piece, back to the 16-byte boundary, are read
// too, and behind it up to the next one or to `end`, that of the tensor, or null where that is a
// boundary: the tensor begins at one.
template <typename T>
__device__ __forceinline__ void fetch_piece(T* stage, const T* source, int count, const T* end,
                                            uint64_t* barrier) {
  constexpr int N = kVectorBytes / sizeof(T);
  const T* const first = source - misalignment(source);
  const int elements = count == 0 ? 0 : misalignment(source) + count;
  int whole = static_cast<int>(ceil_div(elements, N)) * N;
  if (end != nullptr && whole > end - first) {  // the last piece of the tensor
    whole = elements / N * N;
    for (int i = whole; i < elements; ++i) stage[i] = first[i];
  }
  barrier_expect(barrier, whole * sizeof(T));
  if (whole != 0) copy_bytes(stage, first, whole * sizeof(T), barrier);
}

#endif

// target[0, count) = source[m, m + count), m = misalignment(target); by all threads of the block.
template <typename T>
__device__ __forceinline__ void write_piece(T* target, const T* source, int count) {
  constexpr int N = kVectorBytes / sizeof(T);
  const int skipped = misalignment(target);
  T* const first = target - skipped;
  const int end = skipped + count;
  for (int at = threadIdx.x * N; at < end; at += blockDim.x * N) {
    if (at >= skipped && at + N <= end) {
      store_words<N>(first + at, load_words<N>(source + at));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (at + i >= skipped && at + i < end) first[at + i] = source[at + i];
      }
    }
  }
}

// The same by a warp, whose lanes take the elements of the vectors at either end side by side: they
// are a large part of a piece that one warp writes. In plane_strips that would spill on sm_120.
template <typename T>
__device__ __forceinline__ void write_piece_by_warp(T* target, const T* source, int count) {
  constexpr int N = kVectorBytes / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int skipped = misalignment(target);
  T* const first = target - skipped;
  const int end = skipped + count;
  const int head_end = skipped == 0 ? 0 : N, tail = max(end / N * N, head_end);
  for (int at = head_end + lane * N; at < tail; at += 32 * N)
    store_words<N>(first + at, load_words<N>(source + at));
  const int edge = lane < N ? lane : tail + lane - N;
  const bool within = lane < N ? edge >= skipped && edge < min(head_end, end) : edge < end;
  if (lane < 2 * N && within) first[edge] = source[edge];
}

}  // namespace dwswap
