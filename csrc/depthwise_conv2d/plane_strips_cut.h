// How plane_strips cuts a problem into blocks and threads.
#pragma once

#include "common/data_type.h"
#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/form.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace plane_strips {

constexpr int kMaxStages = 2;
constexpr int kStageBytes = 32 * 1024;
constexpr int kStaticBytes = 128;  // of shared memory: the barriers and a row of zeros
static_assert(kMaxStages == 2, "wait_for_groups and the cuts count on it");
// Behind and in front of every piece, for what a thread reads beside its rows and masks.
constexpr int kMargin = 16;

// Of output, per thread. One column makes many threads of a small problem or of short rows. An odd
// number keeps lanes in different shared-memory banks; 7 divides the image widths of most networks.
// Even numbers are for rows of half precision, in pairs that share a word of shared memory: an odd
// number of words, or 8 columns in one access of 16 bytes.
constexpr int kWideColumns = 7, kVectorColumns = 8;
// Too many for the registers of a thread, but where they are all columns of a row.
constexpr int kWholeColumns = 14;
#define DWSWAP_PLANE_STRIPS_PAIRED_COLUMNS 6, kVectorColumns, 10, kWholeColumns
enum class Threads { kNarrow, kWide, kPaired };
constexpr Threads threads_of(int columns) {
  return columns == 1 ? Threads::kNarrow : columns % 2 == 0 ? Threads::kPaired : Threads::kWide;
}

// Of those, of output, in one access to shared memory.
constexpr int together_of(int columns) {
  if (threads_of(columns) != Threads::kPaired) return 1;
  return columns == kVectorColumns ? kVectorColumns : 2;
}

// Up to so many a thread can load anew for every unit.
constexpr int kFewTaps = 9;

// Rows of output that an input row contributes to.
constexpr int open_rows(int kernel_h, int stride) { return (kernel_h + stride - 1) / stride; }

// Steps of the kernel's loop that are unrolled: the rows of sums move by renaming. Too long a body
// would not stay in the instruction cache.
constexpr int unrolled_rows(int kernel_h, int kernel_w, int stride) {
  return kernel_h * kernel_w <= 25 ? open_rows(kernel_h, stride) : 1;
}

// Of a block, and blocks of a multiprocessor: sums and taps share the registers.
constexpr int max_threads(int kernel_h, int kernel_w, int stride, int columns) {
  if (threads_of(columns) == Threads::kPaired) return 128;
  const bool heavy =
      columns > 1 && columns * open_rows(kernel_h, stride) + kernel_h * kernel_w > 64;
  return heavy ? 128 : 256;
}
constexpr int resident_blocks(int kernel_h, int kernel_w, int stride, int columns) {
  if (threads_of(columns) == Threads::kPaired)
    return columns == kWholeColumns ? 4 : columns <= kVectorColumns ? 6 : 5;
  const bool few_taps = kernel_h * kernel_w <= kFewTaps;
  return few_taps || max_threads(kernel_h, kernel_w, stride, columns) < 256 ? 3 : 2;
}

// One stage and one buffer fit every GPU, so a problem that is covered has a cut.
static_assert(2 * (kStageBytes + 3 * kVectorBytes) + kStaticBytes <= Device{}.shared_per_block);

// Rows of output whose sums a thread holds at once, at most; one that does not hold walks down as
// many rows as there are, with the sums of those that its last row of input has not completed.
constexpr int kHeldRows = 7;
static_assert(kHeldRows == kWideColumns, "a thread of so many columns holds a plane");

// How a problem is cut: into units of whole planes, or of a strip of rows of one plane; and a unit
// into threads.
struct Cut {
  int columns;          // of output, per thread
  bool holds;           // its rows
  int planes, rows;     // of output, per unit
  int lanes;            // threads along a row
  int groups;           // threads along the rows
  int stages, buffers;  // in shared memory, for pieces of input and of output
  int64_t in_bytes;     // of the larger pieces, without margins
  int64_t out_bytes;

  int threads() const { return planes * groups * lanes; }
  // In shared memory. A piece begins anywhere within a vector and is copied up to the end of one.
  int64_t stage_bytes() const {
    return (ceil_div(in_bytes, kVectorBytes) + 1) * kVectorBytes + 2 * kMargin;
  }
  int64_t buffer_bytes() const { return (ceil_div(out_bytes, kVectorBytes) + 2) * kVectorBytes; }
  int64_t shared_bytes() const { return stages * stage_bytes() + buffers * buffer_bytes(); }
};

// The order in which units come, and which of them are a block's: chunk by chunk, so that threads
// keep their taps for long; or as they lie in memory, each block with a run of them, or the blocks
// in turn, so that what all of them read and write at a time lies together.
enum class Order { kChunks, kMemory, kMemoryInTurn };
inline Order order_of(const DepthwiseConv2dParams& p, const Cut& cut) {
  constexpr int64_t kLineBytes = 128;
  if (p.kernel_h * p.kernel_w > kFewTaps) return Order::kChunks;
  const bool strips = cut.rows < p.out_h;
  // Strips of which two share a line are faster where one block writes both (benchmarks/NOTES.md).
  return strips && cut.out_bytes % kLineBytes != 0 ? Order::kMemory : Order::kMemoryInTurn;
}

// The cut of a problem that plane_strips covers; the search for it is remembered.
Cut choose_cut(const DepthwiseConv2dParams& params, int element_bytes, const Device& device);

// The compiled sizes: X(kernel_h, kernel_w, stride).
#define DWSWAP_PLANE_STRIPS_SIZES(X) \
  X(3, 3, 1)                         \
  X(3, 3, 2) X(5, 5, 1) X(5, 5, 2) X(7, 7, 1) X(7, 7, 2) X(3, 1, 1) X(1, 3, 1) X(3, 7, 1) X(7, 3, 1)

inline bool is_compiled(const DepthwiseConv2dParams& p) {
#define DWSWAP_CASE(KH, KW, S) \
  if (p.kernel_h == KH && p.kernel_w == KW && p.stride_h == S) return true;
  DWSWAP_PLANE_STRIPS_SIZES(DWSWAP_CASE)
#undef DWSWAP_CASE
  return false;
}

// 5 x 5 and 7 x 7: half of the time that all sizes take to compile.
constexpr bool has_many_taps(int64_t kernel_h, int64_t kernel_w) {
  return kernel_h * kernel_w > 21;
}

// The sizes with paired columns.
constexpr bool has_pairs(int64_t kernel_h, int64_t kernel_w, int64_t stride) {
  return kernel_h == 3 && kernel_w == 3 && stride == 1;
}

// The sizes with threads that have all columns of a row: nothing beside them is in the image.
constexpr bool has_whole_rows(int64_t kernel_h, int64_t kernel_w, int64_t stride, int columns) {
  if (columns == kWholeColumns) return has_pairs(kernel_h, kernel_w, stride);
  return columns == kWideColumns && kernel_h == kernel_w && stride == 1;
}

// The sizes with wide threads that load rows of half precision in words: with stride 2 a thread has
// twice as many elements to load as to compute, and of few taps that counts.
constexpr bool has_even_rows(int64_t kernel_h, int64_t kernel_w, int64_t stride, int columns,
                             int element_bytes) {
  return element_bytes == 2 && columns == kWideColumns && kernel_h == 3 && kernel_w == 3 &&
         stride == 2;
}

// The forms that are compiled into the loads; kClamp has kRelu. All others are applied to a piece
// in place, and the kernel is the one of kAny. Networks have no activations between large kernels,
// and no gates around those that are not square; a single column would take its gates once per tap.
constexpr bool has_form(Form form, int64_t kernel_h, int64_t kernel_w, int columns) {
  if (form == Form::kPlain || form == Form::kAny) return true;
  if (form == Form::kClamp) return kernel_h * kernel_w <= 25;
  return kernel_h == kernel_w && kernel_h <= 5 && columns > 1;
}
constexpr Form compiled_form(Form form, int64_t kernel_h, int64_t kernel_w, int columns) {
  const Form found = relu_as_clamp(form);
  return has_form(found, kernel_h, kernel_w, columns) ? found : Form::kAny;
}

// What threads of so many columns know of the rows of input: nothing; that elements in an even
// place begin a word; or that a thread has all of them, and if it holds its rows, all of a plane.
enum class Rows { kAny, kEven, kWhole };
inline Rows rows_of(int columns, bool holds, const DepthwiseConv2dParams& p, int element_bytes) {
  const auto kh = p.kernel_h, kw = p.kernel_w, stride = p.stride_h;
  const bool whole = p.in_w == columns && p.out_w == columns &&
                     (!holds || (p.in_h == kHeldRows && p.out_h == kHeldRows));
  if (whole && has_whole_rows(kh, kw, stride, columns)) return Rows::kWhole;
  const bool even = p.in_w % 2 == 0 && p.padding_w == kw / 2;
  return even && has_even_rows(kh, kw, stride, columns, element_bytes) ? Rows::kEven : Rows::kAny;
}

// The threads that hold their rows. Of 3 x 3 in half precision those of many pairs, and those that
// have a plane; the others are faster on their way down (benchmarks/NOTES.md). The code of all
// activations behind every row would be 100 KB.
constexpr bool has_holding(int64_t kernel_h, int64_t kernel_w, int64_t stride, int columns,
                           Rows rows, Form form, int element_bytes) {
  if (stride != 1 || kernel_h != kernel_w || columns == 1 || form == Form::kAny) return false;
  if (has_many_taps(kernel_h, kernel_w)) return true;
  const bool many_pairs = columns == kVectorColumns || columns == 10;
  return element_bytes == 2 && (many_pairs || (columns == kWideColumns && rows == Rows::kWhole));
}
inline bool may_hold(int columns, const DepthwiseConv2dParams& p, int element_bytes) {
  return has_holding(p.kernel_h, p.kernel_w, p.stride_h, columns,
                     rows_of(columns, true, p, element_bytes),
                     compiled_form(form_of(p), p.kernel_h, p.kernel_w, columns), element_bytes);
}
// Whether threads hold planes of a problem in half precision.
inline bool may_hold_planes(const DepthwiseConv2dParams& p) {
  return rows_of(kWideColumns, true, p, 2) == Rows::kWhole && may_hold(kWideColumns, p, 2);
}

// Whether threads of so many columns can have a problem: of pairs and vectors, each finds its own
// in whole words.
inline bool allows(int columns, const DepthwiseConv2dParams& p, int element_bytes) {
  if (p.out_w < columns) return false;
  if (threads_of(columns) != Threads::kPaired) return true;
  if (element_bytes != 2 || !has_pairs(p.kernel_h, p.kernel_w, p.stride_h)) return false;
  if (columns == kWholeColumns) return rows_of(columns, false, p, element_bytes) == Rows::kWhole;
  return p.padding_w == p.kernel_w / 2 && p.in_w % together_of(columns) == 0;
}

// Compiled by a file per element type and kind of thread; of those that take long, by one for few
// taps and one for many.
template <typename T, Threads THREADS, bool MANY_TAPS>
cudaError_t launch_cut(const DepthwiseConv2dParams& params, const Cut& cut, const Device& device,
                       bool bulk, cudaStream_t stream);

}  // namespace plane_strips
}  // namespace dwswap
