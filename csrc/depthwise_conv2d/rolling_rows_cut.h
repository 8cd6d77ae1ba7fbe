// How rolling_rows cuts a problem into threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "common/integer.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace rolling_rows {

constexpr int kThreads = 128;

// Outputs of a thread: rows, a dilation apart, of neighbouring columns. Many of them load less for
// each; few make enough threads of a small problem.
struct Cut {
  int rows, columns;
};

// The compiled cuts of a kernel size and an element size, by the outputs of a multiprocessor from
// which they are the fastest (H200, one image; benchmarks/NOTES.md).
struct Step {
  int64_t outputs;
  Cut cut;
};
template <int K, int STRIDE, bool DILATED, int BYTES>
inline constexpr Step kSteps[] = {{0, {1, 1}}, {STRIDE == 1 ? 150 : 260, {4 / STRIDE, 1}}};
template <>
inline constexpr Step kSteps<3, 1, false, 2>[] = {{0, {1, 1}}, {350, {3, 2}}, {10000, {8, 2}}};
template <>
inline constexpr Step kSteps<3, 1, false, 4>[] = {{0, {1, 1}}, {350, {4, 2}}, {10000, {8, 2}}};
template <int BYTES>
inline constexpr Step kSteps<3, 2, false, BYTES>[] = {{0, {1, 2}}, {1600, {4, 1}}};
template <>
inline constexpr Step kSteps<5, 1, false, 2>[] = {
    {0, {1, 1}}, {350, {4, 1}}, {1000, {3, 2}}, {2000, {6, 2}}};
template <>
inline constexpr Step kSteps<5, 1, false, 4>[] = {{0, {1, 1}}, {350, {3, 2}}, {2000, {6, 2}}};
template <>
inline constexpr Step kSteps<5, 2, false, 2>[] = {{0, {2, 1}}, {1400, {4, 2}}};
template <>
inline constexpr Step kSteps<5, 2, false, 4>[] = {{0, {2, 1}}, {600, {4, 1}}};
template <int BYTES>
inline constexpr Step kSteps<3, 1, true, BYTES>[] = {{0, {1, 1}}, {600, {8, 1}}};
template <int K, int BYTES>
inline constexpr Step kSteps<K, 1, true, BYTES>[] = {{0, {1, 1}}, {600, {4, 1}}};
template <int K, int BYTES>
inline constexpr Step kSteps<K, 2, true, BYTES>[] = {{0, {1, 1}}};

template <typename T_, int K_, int STRIDE_, Cut CUT, bool DILATED_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = K_;
  static constexpr bool kDilated = DILATED_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kRows = CUT.rows, kColumns = CUT.columns;
  // A thread holds all its inputs at once.
  static constexpr int kInputRows = (kRows - 1) * STRIDE_ + K_;
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + K_;
  static constexpr bool kWide = kInputRows * kInputColumns > 64;
  static constexpr int kMinBlocks = K_ == 7                                       ? 2
                                    : kWide || (K_ == 5 && DILATED_ && kRows > 1) ? 3
                                                                                  : 4;
  static_assert(!DILATED_ || kColumns == 1);
  static_assert(kInputRows <= 32 && kInputColumns <= 32, "one bit each says which are inside");
};

// Threads that share columns of output.
inline int64_t strips_of(const DepthwiseConv2dParams& p, int rows) {
  const int64_t row_step = rows == 1 ? 1 : p.dilation_h;
  return ceil_div(p.out_h, rows * row_step) * row_step;
}

// Calls visit.operator()<Traits>() for the problem's size, if it is compiled, and its cut.
template <typename T, typename Visit>
void visit(const DepthwiseConv2dParams& p, int multiprocessors, Visit&& visit) {
  const auto visit_step = [&]<int K, int S, bool DILATED>() {
    constexpr auto& kAll = kSteps<K, S, DILATED, sizeof(T)>;
    // The last step whose outputs the problem has. Rows a dilation apart are not in a small image.
    std::size_t chosen = p.dilation_h > p.out_h ? 0 : std::size(kAll) - 1;
    while (p.outputs() < kAll[chosen].outputs * multiprocessors) --chosen;
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      ((I == chosen ? visit.template operator()<Traits<T, K, S, kAll[I].cut, DILATED>>() : void()),
       ...);
    }(std::make_index_sequence<std::size(kAll)>());
  };
#define DWSWAP_CASE(K, S)                                                  \
  if (p.kernel_h == K && p.kernel_w == K && p.stride_h == S) {             \
    return p.is_dilated() ? visit_step.template operator()<K, S, true>()   \
                          : visit_step.template operator()<K, S, false>(); \
  }
  DWSWAP_CASE(3, 1)
  DWSWAP_CASE(3, 2)
  DWSWAP_CASE(5, 1)
  DWSWAP_CASE(5, 2)
  DWSWAP_CASE(7, 1)
  DWSWAP_CASE(7, 2)
#undef DWSWAP_CASE
}

// Of a thread; no rows where the size is not compiled.
inline Cut cut_of(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  Cut cut{};
  const auto note = [&]<typename Traits>() { cut = {Traits::kRows, Traits::kColumns}; };
  element_bytes == 4 ? visit<float>(p, multiprocessors, note)
                     : visit<uint16_t>(p, multiprocessors, note);
  return cut;
}

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const DepthwiseConv2dParams& params, cudaStream_t stream);

}  // namespace rolling_rows
}  // namespace dwswap
