// What a thread of plane_strips does of a unit: it walks down the rows of its columns, or holds the
// sums of a few.
#pragma once

#include "common/numeric.cuh"
#include "depthwise_conv2d/form.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/plane_strips_cut.h"

namespace dwswap {
namespace plane_strips {

template <typename T_, int KH_, int KW_, int STRIDE_, int COLUMNS_, Rows ROWS_, bool HOLDS_,
          Form FORM_>
struct Traits {
  using T = T_;
  static constexpr Form kForm = FORM_;
  static constexpr int kKernelH = KH_;
  static constexpr int kKernelW = KW_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kColumns = COLUMNS_;
  // Elements of output and of input in one access to shared memory.
  static constexpr int kTogether = together_of(COLUMNS_);
  static constexpr int kInputTogether = ROWS_ == Rows::kEven ? 2 : kTogether;
  static constexpr int kInputColumns = (kColumns - 1) * STRIDE_ + KW_;
  // Only so many columns at either end of a thread's row can lie outside the image.
  static constexpr int kMaxPaddingW = KW_ / 2;
  // A thread has all columns of a row: they always do.
  static constexpr bool kWhole = ROWS_ == Rows::kWhole;
  static constexpr bool is_outside(int column) {
    return kWhole && (column < kMaxPaddingW || column >= kMaxPaddingW + COLUMNS_);
  }
  static constexpr int kOpenRows = open_rows(KH_, STRIDE_);
  static constexpr bool kHolds = HOLDS_;
  // A thread holds a plane: of the rows of input that its outputs see, these are not there.
  static constexpr bool kWholePlane = kHolds && kWhole;
  static constexpr bool is_beyond(int row) {
    return kWholePlane && (row < KH_ / 2 || row >= KH_ / 2 + kHeldRows);
  }
  static constexpr int kMaxThreads = max_threads(KH_, KW_, STRIDE_, COLUMNS_);
  static constexpr int kMinBlocks = resident_blocks(KH_, KW_, STRIDE_, COLUMNS_);
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  const void* end;          // of the input, where that is no multiple of 16 bytes; else null
  int in_image, out_image;  // elements of a sample
  int channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int planes, rows, group_rows;  // of output, per unit and per thread
  int share, longer_shares;      // units of a block, and blocks that have one more
  Order order;
  int stages, buffers;
  int in_bytes, out_bytes;  // of a stage and of a buffer, margins included
  Divisor by_strips, by_lanes, by_groups;
  Divisor by_inner;  // the images of a chunk, or the chunks of an image
  bool bulk;         // copies by the copy engine
  bool ragged;       // threads share columns
  bool transforms_input, reversed_taps;
  Activation input_activation, activation;
};

// What one thread computes of a unit: rows of some neighbouring columns.
template <typename T>
struct Walk {
  int rows;      // of output
  int in_rows;   // of the piece
  int ih, iw;    // the first row and column that it reads; the row counts from that of the piece
  const T* row;  // where they lie
  T* out;        // where its first row goes
  int skipped;   // columns that a neighbour stores
};

// The elements that a thread sees of a row.
template <typename Traits>
__device__ __forceinline__ void load_row(const typename Traits::T* row,
                                         float (&x)[Traits::kInputColumns]) {
  constexpr int N = Traits::kInputColumns, STEP = Traits::kInputTogether;
  // An access begins where a multiple of its columns does in the image; the first column is the
  // padding's width in front of one.
  constexpr int FIRST = Traits::kMaxPaddingW % STEP, LAST = FIRST + (N - FIRST) / STEP * STEP;
#pragma unroll
  for (int c = 0; c < N; ++c) {
    if (Traits::is_outside(c)) continue;
    if (STEP == 1 || c < FIRST || c >= LAST) {
      x[c] = widen(row[c]);
    } else if ((c - FIRST) % STEP == 0) {
      float part[STEP];
      load(row + c, part);
#pragma unroll
      for (int e = 0; e < STEP; ++e) x[c + e] = part[e];
    }
  }
}

// Of a row of output, all columns but those that a neighbour stores.
template <typename Traits>
__device__ __forceinline__ void store_row(typename Traits::T* out,
                                          const float (&x)[Traits::kColumns], bool ragged,
                                          int skipped) {
  constexpr int STEP = Traits::kTogether;
#pragma unroll
  for (int i = 0; i < Traits::kColumns; i += STEP) {
    if (ragged && i < skipped) continue;
    float part[STEP];
#pragma unroll
    for (int e = 0; e < STEP; ++e) part[e] = x[i + e];
    store(out + i, part);
  }
}

// The elements that a thread sees of a row as the taps see them: activated, and zero where they lie
// beside the image, or above or below it: where `inside` is not.
template <typename Traits>
__device__ __forceinline__ void transform_row(float (&x)[Traits::kInputColumns], bool inside,
                                              int iw, float input_bias, const Arguments& a) {
  constexpr Form FORM = Traits::kForm;
  constexpr int N = Traits::kInputColumns;
  const float low = low_of(a.input_activation), high = high_of(a.input_activation);
#pragma unroll
  for (int c = 0; c < N; ++c) {
    if (Traits::is_outside(c)) continue;
    if constexpr (FORM == Form::kClamp) x[c] = inside ? clamp(x[c] + input_bias, low, high) : 0.0f;
    if constexpr (FORM == Form::kHardswish) x[c] = inside ? hardswish_of(x[c] + input_bias) : 0.0f;
    if constexpr (FORM == Form::kSilu) x[c] = inside ? silu_of(x[c] + input_bias) : 0.0f;
  }
#pragma unroll
  for (int c = 0; c < Traits::kMaxPaddingW && !Traits::kWhole; ++c) {
    if (iw + c < 0) x[c] = 0.0f;
    if (iw + N - 1 - c >= a.in_w) x[N - 1 - c] = 0.0f;
  }
}

// sums += one row of taps, the one with `first_tap`.
template <typename Traits>
__device__ __forceinline__ void add_row(float (&sums)[Traits::kColumns],
                                        const float (&x)[Traits::kInputColumns],
                                        const float (&taps)[Traits::kKernelH * Traits::kKernelW],
                                        int first_tap) {
  constexpr int S = Traits::kStride;
#pragma unroll
  for (int kw = 0; kw < Traits::kKernelW; ++kw) {
#pragma unroll
    for (int i = 0; i < Traits::kColumns; ++i) {
      if (!Traits::is_outside(i * S + kw)) sums[i] += x[i * S + kw] * taps[first_tap + kw];
    }
  }
}

// A row of output that is complete.
template <typename Traits>
__device__ __forceinline__ void finish_row(float (&sums)[Traits::kColumns],
                                           Walk<typename Traits::T>& w, const Arguments& a) {
  constexpr Form FORM = Traits::kForm;
  const float low = low_of(a.activation), high = high_of(a.activation);
  if constexpr (FORM == Form::kAny) activate(sums, a.activation);
#pragma unroll
  for (int i = 0; i < Traits::kColumns; ++i) {
    if constexpr (FORM == Form::kClamp) sums[i] = clamp(sums[i], low, high);
    if constexpr (FORM == Form::kHardswish) sums[i] = hardswish_of(sums[i]);
    if constexpr (FORM == Form::kSilu) sums[i] = silu_of(sums[i]);
  }
  if (a.ragged) {
    store_row<Traits>(w.out, sums, true, w.skipped);
  } else {
    store_row<Traits>(w.out, sums, false, 0);
  }
  w.out += a.out_w;
}

template <typename Traits>
__device__ __forceinline__ void walk(Walk<typename Traits::T> w,
                                     const float (&taps)[Traits::kKernelH * Traits::kKernelW],
                                     float bias, float input_bias, const Arguments& a) {
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW, S = Traits::kStride;
  constexpr int COLUMNS = Traits::kColumns, OPEN = Traits::kOpenRows;
  constexpr int UNROLL = Traits::kForm == Form::kAny ? 1 : unrolled_rows(KH, KW, S);

  // sums[q] is the row of output whose window began q steps ago; a step takes S rows of input.
  float sums[OPEN][COLUMNS];
#pragma unroll
  for (int q = 0; q < OPEN; ++q) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) sums[q][i] = bias;
  }
  const auto take_row = [&](int j, int oldest) {
    float x[Traits::kInputColumns];
    load_row<Traits>(w.row, x);
    transform_row<Traits>(x, true, w.iw, input_bias, a);
#pragma unroll
    for (int q = 0; q < OPEN; ++q) {
      const int kh = S * q + j;
      if (q <= oldest && kh < KH) add_row<Traits>(sums[q], x, taps, kh * KW);
    }
  };
  const auto next_row = [&] { ++w.ih, w.row += a.in_w; };
  const auto inside = [&] {
    return static_cast<unsigned>(w.ih) < static_cast<unsigned>(w.in_rows);
  };
  const auto next_sums = [&] {
#pragma unroll
    for (int q = OPEN - 1; q > 0; --q) {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) sums[q][i] = sums[q - 1][i];
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) sums[0][i] = bias;
  };
  const auto finish = [&] {
    finish_row<Traits>(sums[OPEN - 1], w, a);
    next_sums();
  };

#pragma unroll
  for (int step = 0; step < OPEN - 1; ++step) {
#pragma unroll
    for (int j = 0; j < S; ++j, next_row()) {
      if (inside()) take_row(j, step);
    }
    next_sums();
  }
  // From here on no row is above the piece. Steps whose rows all lie in it do not ask. Two loops by
  // hand: nvcc 13.0 unrolls one whose bound differs between the lanes of a warp a row too far.
  int done = 0;
  const int full = min(w.rows, (w.in_rows - w.ih) / S);
  for (; done + UNROLL <= full; done += UNROLL) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int j = 0; j < S; ++j, next_row()) take_row(j, OPEN - 1);
      finish();
    }
  }
  for (; done < w.rows; ++done) {
#pragma unroll
    for (int j = 0; j < S; ++j, next_row()) {
      if (inside()) take_row(j, OPEN - 1);
    }
    finish();
  }
}

// At most kHeldRows rows, without a loop: a row of input that is not in the piece is the one of
// `zeros` and no branch, so the loads of a row come before the multiply-adds of those above.
template <typename Traits>
__device__ __forceinline__ void hold(Walk<typename Traits::T> w,
                                     const float (&taps)[Traits::kKernelH * Traits::kKernelW],
                                     float bias, float input_bias, const typename Traits::T* zeros,
                                     const Arguments& a) {
  constexpr int KH = Traits::kKernelH, KW = Traits::kKernelW, ROWS = kHeldRows;
  static_assert(Traits::kStride == 1);
  float sums[ROWS][Traits::kColumns];
#pragma unroll
  for (int i = 0; i < ROWS + KH - 1; ++i, ++w.ih, w.row += a.in_w) {
    float x[Traits::kInputColumns];
    if (!Traits::is_beyond(i)) {
      const bool inside =
          Traits::kWholePlane || static_cast<unsigned>(w.ih) < static_cast<unsigned>(w.in_rows);
      load_row<Traits>(inside ? w.row : zeros, x);
      transform_row<Traits>(x, inside, w.iw, input_bias, a);
    }
    if (i < ROWS) {
#pragma unroll
      for (float& sum : sums[i]) sum = bias;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r <= i && i < r + KH && !Traits::is_beyond(i))
        add_row<Traits>(sums[r], x, taps, (i - r) * KW);
    }
    if (i < KH - 1) continue;
    if (!Traits::kWholePlane && i - (KH - 1) >= w.rows) return;
    finish_row<Traits>(sums[i - (KH - 1)], w, a);
  }
}

}  // namespace plane_strips
}  // namespace dwswap
