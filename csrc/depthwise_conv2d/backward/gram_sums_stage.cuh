// What gram_sums reads: stages that the copy engine fills, and rows that warps spread from them.
#pragma once

#include "common/numeric.cuh"
#include "common/tma.cuh"
#include "depthwise_conv2d/backward/gram_sums_cut.h"

namespace dwswap {
namespace gram_sums {

// One of the two images.
struct Side {
  const unsigned char* data;
  int height, width;
  uint32_t begin;  // of its part of a stage
  uint32_t bytes;  // see Cut
  Rows rows;
  int pieces;              // of a row
  int moved;               // rows that a warp moves at once; lanes have a piece each
  int from_step, to_step;  // bytes to those that it moves next
};

struct Arguments {
  Side input, grad;
  int batch, channels, out_h, padding_h;
  int unseen;         // columns of the input's rows before the first that a tile sees
  int images, rows;   // of a unit
  int units, shares;  // images, or strips of them
  int groups;         // of channels
  int tiles;          // of the columns of grad_output
  bool whole_planes;  // see Cut
  int together;
  uint32_t stage_bytes, spread_bytes;
  int slots;
  Divisor by_strips;
};

// Rows of an image: which there are of those that products see.
struct Window {
  int row;         // of the image, of the first of them; may be negative
  int begin, end;  // of those that there are, counted from that one
};

struct Unit {
  int image, images;
  Window input, grad;
};

template <int STRIDE>
__device__ __forceinline__ Unit unit_at(const Arguments& a, int index) {
  uint32_t strip;
  Unit u{};
  u.image = static_cast<int>(a.by_strips.divide(index, &strip)) * a.images;
  u.images = min(a.images, a.batch - u.image);
  const int row = static_cast<int>(strip) * a.rows, in_row = row * STRIDE - a.padding_h;
  u.grad = {row, 0, min(a.rows, a.out_h - row)};
  u.input = {in_row, max(0, -in_row), min(a.input.rows.count, a.input.height - in_row)};
  return u;
}

// Where the rows of a window, or whole planes, begin in memory, in bytes. In 32 bits it may
// overflow, which does not change what is left of it modulo kCopyBytes.
template <typename Integer>
__device__ __forceinline__ Integer place_of(const Side& s, const Arguments& a, int image,
                                            int channel, const Window& w) {
  const int row = a.whole_planes ? 0 : w.row + w.begin;
  return ((static_cast<Integer>(image) * a.channels + channel) * s.height + row) * s.width * 2;
}

#if DWSWAP_BULK_COPIES

// By all lanes of a warp, each of which brings what one copy can: the planes of 8 channels of an
// image, or a strip of one.
__device__ __forceinline__ void fetch(const Arguments& a, const Unit& u, int first_channel,
                                      unsigned char* stage, uint64_t* barrier) {
  const int lane = threadIdx.x % 32, count = a.whole_planes ? u.images : kChannels;
  const bool is_grad = lane >= count;
  const int index = is_grad ? lane - count : lane;
  const Side& s = is_grad ? a.grad : a.input;
  const Window w = is_grad ? u.grad : u.input;
  const auto place = place_of<int64_t>(s, a, a.whole_planes ? u.image + index : u.image,
                                       first_channel + (a.whole_planes ? 0 : index), w);
  const auto lead = static_cast<int>(place % kCopyBytes);
  const int rows = a.whole_planes ? kChannels * s.height : w.end - w.begin;
  const int bytes =
      index >= count ? 0 : (lead + rows * s.width * 2 + kCopyBytes - 1) / kCopyBytes * kCopyBytes;
  const auto all_bytes = __reduce_add_sync(~0u, static_cast<unsigned>(bytes));
  if (lane == 0) barrier_expect(barrier, all_bytes);
  __syncwarp();
  if (bytes > 0)
    copy_bytes(stage + s.begin + index * s.bytes, s.data + place - lead, bytes, barrier);
}

template <typename Word>
__device__ __forceinline__ Word load_shared(uint32_t address) {
  return *static_cast<const Word*>(__cvta_shared_to_generic(address));
}
template <typename Word>
__device__ __forceinline__ void store_shared(uint32_t address, Word word) {
  *static_cast<Word*>(__cvta_shared_to_generic(address)) = word;
}

// What a lane moves of rows: a piece of every so many-th, from `row` on.
struct Part {
  int row, piece;

  __device__ __forceinline__ explicit Part(const Side& s)
      : row(threadIdx.x % 32 / s.pieces), piece(threadIdx.x % 32 % s.pieces) {}

  // From the first row of all to its piece; many bytes where it moves none.
  __device__ __forceinline__ int from(const Side& s) const {
    constexpr int kNone = 1 << 24;
    return row < s.moved ? row * s.width * 2 + piece * s.rows.piece : kNone;
  }
  // From where a row is placed to its piece.
  __device__ __forceinline__ int to(const Side& s) const {
    return s.rows.lead + piece * s.rows.piece;
  }
  // Of a pair of elements, those that are in the row.
  __device__ __forceinline__ uint32_t mask(const Side& s) const {
    return 2 * piece + 1 < s.width ? ~0u : 0xffffu;
  }
};

// Where a row of an image lies. PARTS: 2 where even and odd rows are apart. A warp moves an even
// number of rows then, so that all rows of a lane are of one part.
template <int PARTS>
__device__ __forceinline__ int place_of_row(const Rows& rows, int row) {
  return PARTS == 1 ? row * rows.pitch : row % 2 * rows.odd_rows + row / 2 * rows.pitch;
}

template <typename Move>
__device__ __forceinline__ void for_each_row(const Side& s, uint32_t from, uint32_t end,
                                             uint32_t to, Move&& move) {
#pragma unroll 1
  for (; from < end; from += s.from_step, to += s.to_step) move(from, to);
}

// Rows that end at `end` to their places, in shared memory. Of the lane: `from` is where its piece
// of the first one is, `to` where that goes.
__device__ __forceinline__ void spread(const Side& s, const Part& part, uint32_t from, uint32_t end,
                                       uint32_t to) {
  if (!s.rows.is_aligned) {
    // A row ends in the middle of a word.
    const uint32_t mask = part.mask(s);
    for_each_row(s, from, end, to, [&](uint32_t source, uint32_t target) {
      const uint32_t words = source & ~3u, first = load_shared<uint32_t>(words);
      // The shift counts modulo 32: by none or half of a word.
      const uint32_t pair = __funnelshift_r(first, load_shared<uint32_t>(words + 4), source * 8);
      store_shared(target, pair & mask);
    });
  } else if (s.rows.piece == 8) {
    for_each_row(s, from, end, to, [](uint32_t source, uint32_t target) {
      store_shared(target, load_shared<uint2>(source));
    });
  } else {
    for_each_row(s, from, end, to, [](uint32_t source, uint32_t target) {
      store_shared(target, load_shared<uint32_t>(source));
    });
  }
}

// Zeros to so many bytes of shared memory, a multiple of 16.
__device__ __forceinline__ void clear(uint32_t from, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x % 32 * kCopyBytes; i < bytes; i += 32 * kCopyBytes)
    store_shared(from + i, uint4{});
}

// Zeros to the rows around a window that other strips have.
template <int PARTS>
__device__ __forceinline__ void clear_around(const Side& s, const Window& w, uint32_t image) {
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const auto rows_to = [&](int row) { return (row - i + PARTS - 1) / PARTS * s.rows.pitch; };
    const uint32_t rows = image + i * s.rows.odd_rows;
    clear(rows, rows_to(w.begin));
    clear(rows + rows_to(w.end), rows_to(s.rows.count) - rows_to(w.end));
  }
}

#endif

}  // namespace gram_sums
}  // namespace dwswap
