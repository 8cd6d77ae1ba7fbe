// The copy engine: bulk copies into and out of shared memory, and the barriers they complete on.
// Shared memory is copied in pieces of 16 bytes.
#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "cuda.h"
#include "state.h"

namespace emulator {

Timing timing;

namespace {

constexpr uint32_t kPiece = 16, kPlacesOfPiece = kPiece / 2;
constexpr uint64_t kMark = 0xba55ba55ba55ba55u;  // what a barrier holds in shared memory
constexpr uint16_t kGarbage = 0x5640;            // what a target holds until its copy arrives

struct Piece {
  uint32_t shared;        // an offset
  unsigned char* global;  // null: zeros to read, or nothing to write
};
struct Copy {
  uint32_t barrier;
  std::vector<Piece> pieces;
};
struct Write {
  int thread;
  std::vector<Piece> pieces;
  bool has_read;
  std::vector<unsigned char> data;
};
struct Barrier {
  int arrivals, pending;
  int64_t bytes;  // that are still to come
  uint32_t phase;
};
std::vector<Copy> copies;
std::vector<Write> writes;
std::map<uint32_t, Barrier> barriers;

Place* places_of(const Piece& piece) { return places + piece.shared / 2; }

Barrier& barrier_at(uint32_t address, const char* what) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) give_up("%s at what is no barrier", what);
  if (address < kStaticBase &&
      std::memcmp(shared_memory + (address - kSharedBase), &kMark, sizeof kMark) != 0)
    give_up("%s at a barrier that was overwritten", what);
  return found->second;
}

void complete_phase(uint32_t address) {
  Barrier& b = barriers[address];
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  wake_waiting(address, ++b.phase);
}

void arrive(size_t index) {
  const Copy copy = std::move(copies[index]);
  copies.erase(copies.begin() + static_cast<ptrdiff_t>(index));
  for (const Piece& piece : copy.pieces) {
    unsigned char* const target = shared_memory + piece.shared;
    if (piece.global != nullptr) {
      std::memcpy(target, piece.global, kPiece);
    } else {
      std::memset(target, 0, kPiece);
    }
    for (Place* p = places_of(piece); p != places_of(piece) + kPlacesOfPiece; ++p)
      p->arriving = p->unfenced = false, p->writer = kNobody;
  }
  barriers[copy.barrier].bytes -= int64_t{kPiece} * static_cast<int64_t>(copy.pieces.size());
  complete_phase(copy.barrier);
}

void start_copy(uint32_t barrier, std::vector<Piece>&& pieces) {
  barrier_at(barrier, "a bulk copy");
  for (const Piece& piece : pieces) {
    if (piece.shared + kPiece > shared_bytes)
      give_up("a bulk copy writes outside of shared memory [byte %u]", piece.shared);
    for (uint32_t i = 0; i < kPlacesOfPiece; ++i) {
      Place& p = places_of(piece)[i];
      if (p.arriving) error("two bulk copies arrive at the same place");
      if (p.leaving != 0) error("a bulk copy overwrites what a bulk write still reads");
      if (p.unfenced) error("a bulk copy overwrites what was written without a fence");
      if (p.read == interval && p.reader != kNobody && p.reader != current)
        error(
            "race: a bulk copy overwrites what another thread reads, without a barrier "
            "[thread %d, byte %u]",
            p.reader, piece.shared);
      if (p.written == interval && p.writer >= 0 && p.writer != current)
        error("race: a bulk copy overwrites what another thread wrote, without a barrier");
      p.arriving = true;
      std::memcpy(shared_memory + piece.shared + 2 * i, &kGarbage, sizeof kGarbage);
    }
  }
  copies.push_back({barrier, std::move(pieces)});
  if (timing == Timing::kAtOnce) arrive(copies.size() - 1);
}

void read_for(Write& write) {
  if (write.has_read) return;
  write.has_read = true;
  for (const Piece& piece : write.pieces) {
    const unsigned char* const source = shared_memory + piece.shared;
    write.data.insert(write.data.end(), source, source + kPiece);
    for (uint32_t i = 0; i < kPlacesOfPiece; ++i) {
      Place& p = places_of(piece)[i];
      --p.leaving;
      note_read(p, write.thread);
    }
  }
}

void finish(Write& write) {
  read_for(write);
  for (size_t i = 0; i < write.pieces.size(); ++i) {
    if (write.pieces[i].global != nullptr)
      std::memcpy(write.pieces[i].global, &write.data[kPiece * i], kPiece);
  }
}

void start_write(std::vector<Piece>&& pieces) {
  for (Piece& piece : pieces) {
    if (piece.shared + kPiece > shared_bytes)
      give_up("a bulk write reads outside of shared memory [byte %u]", piece.shared);
    for (uint32_t i = 0; i < kPlacesOfPiece; ++i) {
      Place& p = places_of(piece)[i];
      if (p.arriving) error("a bulk write reads where a bulk copy arrives");
      if (p.unfenced) error("a bulk write reads what was written without a fence");
      if (p.written == interval && p.writer >= 0 && p.writer != current)
        error("race: a bulk write reads what another thread wrote, without a barrier");
      ++p.leaving;
    }
    if (piece.global != nullptr && !check_global(piece.global, kPiece, true, "a bulk write"))
      piece.global = nullptr;
  }
  writes.push_back({current, std::move(pieces), false, {}});
  if (timing == Timing::kAtOnce) {
    finish(writes.back());
    writes.pop_back();
  }
}

// The pieces of consecutive bytes.
std::vector<Piece> pieces_of(uint32_t shared, const void* global, uint32_t bytes) {
  if (shared % kPiece != 0 || bytes % kPiece != 0 || bytes == 0 ||
      reinterpret_cast<uintptr_t>(global) % kPiece != 0)
    give_up("a bulk copy that is empty or not aligned to %u bytes", kPiece);
  auto* const first = static_cast<unsigned char*>(const_cast<void*>(global));
  std::vector<Piece> pieces;
  for (uint32_t i = 0; i < bytes; i += kPiece)
    pieces.push_back({shared - kSharedBase + i, first + i});
  return pieces;
}

// Those of a box. The swizzle moves a piece within its line of 128 bytes, by the line's number.
std::vector<Piece> pieces_of(uint32_t shared, const CUtensorMap& map, const int (&first)[4]) {
  if (shared % 128 != 0) give_up("a box at an address that is no multiple of 128");
  const uint32_t mask = map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 0x70
                        : map.swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 0x30
                        : map.swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 0x10
                                                                   : 0;
  constexpr uint32_t kElements = kPiece / 2;
  const auto& box = map.box;
  const uint32_t count = box[0] / kElements * box[1] * box[2] * box[3];
  std::vector<Piece> pieces;
  for (uint32_t i = 0; i < count; ++i, shared += kPiece) {
    const uint32_t element = i * kElements;
    const int64_t at[4] = {first[0] + int64_t{element % box[0]},
                           first[1] + int64_t{element / box[0] % box[1]},
                           first[2] + int64_t{element / (box[0] * box[1]) % box[2]},
                           first[3] + int64_t{element / (box[0] * box[1] * box[2])}};
    bool inside = true;
    int64_t offset = at[0] * 2;
    for (int d = 0; d < 4; ++d) {
      inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(map.sizes[d]);
      if (d > 0) offset += at[d] * static_cast<int64_t>(map.pitches[d - 1]);
    }
    const uint32_t swizzled = shared ^ (shared >> 3 & mask);
    pieces.push_back({swizzled - kSharedBase, inside ? map.start + offset : nullptr});
  }
  return pieces;
}

}  // namespace

void begin_copies() { copies.clear(), writes.clear(), barriers.clear(); }
bool any_arriving() { return !copies.empty(); }
void let_one_arrive() { arrive(random_bits() % copies.size()); }

void check_end_of_thread(int thread) {
  for (const Write& write : writes) {
    if (write.thread == thread && !write.has_read)
      error("a thread ends whose bulk writes may not have read shared memory");
  }
}

void check_end_of_block() {
  if (!copies.empty()) error("a block ends while bulk copies arrive");
  for (const auto& [address, b] : barriers) {
    if (b.pending != b.arrivals || b.bytes != 0)
      error("a block ends with a barrier in an incomplete phase");
  }
  if (recomputing && !writes.empty())
    error("bulk writes are not waited for before outputs are computed anew");
  for (Write& write : writes) finish(write);
}

void barrier_init(uint32_t barrier, int arrivals) {
  if (barrier < kStaticBase) {
    const size_t at = barrier - kSharedBase;
    if (barrier % sizeof kMark != 0 || !check_shared(at, sizeof kMark, true, "mbarrier.init"))
      give_up("a barrier is misplaced");
    std::memcpy(shared_memory + at, &kMark, sizeof kMark);
  }
  if (!barriers.insert({barrier, {arrivals, arrivals, 0, 0}}).second)
    error("a barrier is initialised twice");
}

void barrier_expect(uint32_t barrier, uint32_t bytes) {
  Barrier& b = barrier_at(barrier, "an arrival");
  if (b.pending == 0) error("more arrivals at a barrier than it was initialised for");
  // Whoever waits for the barrier sees what this thread wrote before.
  for (const uint32_t i : unreleased[current]) {
    if (places[i].writer == current) places[i].writer = kNobody;
  }
  unreleased[current].clear();
  b.bytes += bytes, --b.pending;
  complete_phase(barrier);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  if (barrier_at(barrier, "a wait").phase % 2 == parity) wait_for_phase(barrier, parity);
}

void copy_bytes(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  auto pieces = pieces_of(target, source, bytes);
  if (!check_global(source, bytes, false, "a bulk copy")) give_up("that copy cannot be made");
  start_copy(barrier, std::move(pieces));
}

void copy_box(uint32_t target, const void* map, uint32_t barrier, int c, int w, int h, int n) {
  auto pieces = pieces_of(target, *static_cast<const CUtensorMap*>(map), {c, w, h, n});
  for (Piece& piece : pieces) {
    if (piece.global != nullptr && !check_global(piece.global, kPiece, false, "a copy of a box"))
      piece.global = nullptr;
  }
  start_copy(barrier, std::move(pieces));
}

void write_bytes(void* target, uint32_t source, uint32_t bytes) {
  start_write(pieces_of(source, target, bytes));
}

void write_box(const void* map, uint32_t source, int c, int w, int h, int n) {
  start_write(pieces_of(source, *static_cast<const CUtensorMap*>(map), {c, w, h, n}));
}

void fence() {
  for (const uint32_t i : unfenced[current]) places[i].unfenced = false;
  unfenced[current].clear();
}

void wait_for_reads() {
  for (Write& write : writes) {
    if (write.thread == current) read_for(write);
  }
}

void wait_for_writes() {
  const auto mine = [](Write& write) {
    if (write.thread == current) finish(write);
    return write.thread == current;
  };
  writes.erase(std::remove_if(writes.begin(), writes.end(), mine), writes.end());
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* start,
                const cuuint64_t* sizes, const cuuint64_t* pitches, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr uint32_t kMostElements = 256;
  const uint32_t swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                                 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                 : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                                        : 2 * kMostElements;
  bool valid = rank == 4 && reinterpret_cast<uintptr_t>(start) % kPiece == 0 &&
               box[0] * 2 % kPiece == 0 && box[0] * 2 <= swizzle_bytes;
  for (int i = 0; i < 4; ++i) {
    valid = valid && sizes[i] >= 1 && box[i] >= 1 && box[i] <= kMostElements && steps[i] == 1;
    if (i < 3) valid = valid && pitches[i] % kPiece == 0;
  }
  if (!valid) {
    error("a tensor map that would be refused");
    return CUDA_ERROR_INVALID_VALUE;
  }
  map->start = static_cast<unsigned char*>(start), map->swizzle = swizzle;
  std::copy(sizes, sizes + 4, map->sizes);
  std::copy(pitches, pitches + 3, map->pitches);
  std::copy(box, box + 4, map->box);
  return CUDA_SUCCESS;
}

}  // namespace emulator
