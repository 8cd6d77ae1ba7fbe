// Global and shared memory: what the compiler's hooks and the copies check at every access.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>

#include "state.h"

namespace emulator {

Report report;
alignas(1024) unsigned char shared_memory[kArenaBytes];
Place places[kArenaBytes / 2];
size_t shared_bytes;
uint32_t interval;
std::vector<uint8_t> written;

namespace {

constexpr uint16_t kNaN = 0x7fff;  // in float16 and in bfloat16
constexpr size_t kGlobalBytes = size_t{512} << 20, kAround = 4096;

struct Tensor {
  const char* name;
  unsigned char* begin;
  size_t bytes;
  bool writable;
};
std::vector<Tensor> tensors;
unsigned char* free_memory;  // behind the last tensor
std::map<const void*, uint32_t> static_addresses;

unsigned char* global_memory() {
  static void* const memory = mmap(nullptr, kGlobalBytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return static_cast<unsigned char*>(memory);
}

bool lies_in(const void* pointer, const unsigned char* memory, size_t bytes) {
  return pointer >= memory && pointer < memory + bytes;
}

void fill_with_nan(unsigned char* begin, const unsigned char* end) {
  for (; begin < end; begin += sizeof kNaN) std::memcpy(begin, &kNaN, sizeof kNaN);
}

}  // namespace

void error(const char* format, ...) {
  static std::set<std::string> kinds;
  if (report.errors++ == 0) kinds.clear();
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!kinds.insert(std::string(text, std::strcspn(text, "["))).second) return;
  report.messages += std::string(text) + " (block " + std::to_string(block_index.x) + ", thread " +
                     std::to_string(current) + ")\n";
}

void unsupported(const char* what) { error("not emulated: %s", what); }

void clear_shared_memory(size_t bytes) {
  shared_bytes = bytes;
  interval = 1;
  fill_with_nan(shared_memory, shared_memory + bytes);
  std::fill(places, places + (bytes + 1) / 2, Place{kNobody, kNobody, 0, 0, 0, false, false});
}

void clear_tensors() {
  tensors.clear();
  static_addresses.clear();
  free_memory = global_memory() + kAround;
}

unsigned char* place_tensor(const char* name, const void* elements, int64_t count, int64_t offset,
                            bool writable) {
  constexpr size_t kElement = 2, kAlignment = 256;
  const size_t bytes = count * kElement;
  unsigned char* const begin = free_memory + offset * kElement;
  free_memory += (offset * kElement + bytes + 2 * kAround) / kAlignment * kAlignment;
  fill_with_nan(begin - kAround, free_memory);
  std::memcpy(begin, elements, bytes);
  tensors.push_back({name, begin, bytes, writable});
  return begin;
}

bool check_global(const void* pointer, size_t bytes, bool write, const char* what) {
  const auto* const at = static_cast<const unsigned char*>(pointer);
  const char* const verb = write ? "writes" : "reads";
  for (const Tensor& t : tensors) {
    if (at < t.begin || at + bytes > t.begin + t.bytes) continue;
    if (write && !t.writable) {
      error("%s writes to %s", what, t.name);
      return false;
    }
    if (write && !recomputing) {
      for (size_t i = 0; i < bytes; i += 2) ++written[(at - t.begin + i) / 2];
    }
    return true;
  }
  for (const Tensor& t : tensors) {
    if (at + bytes <= t.begin - kAround || at >= t.begin + t.bytes + kAround) continue;
    error("%s %s outside of %s [byte %td of %zu]", what, verb, t.name, at - t.begin, t.bytes);
    return false;
  }
  error("%s %s global memory where there is no tensor", what, verb);
  return false;
}

bool is_in_shared(size_t at, size_t bytes, bool write, const char* what) {
  if (at + bytes <= shared_bytes && at + bytes >= bytes) return true;
  error("%s %s outside of shared memory [byte %td of %zu]", what, write ? "writes" : "reads",
        static_cast<ptrdiff_t>(at), shared_bytes);
  return false;
}

void note_read(Place& place, int read_by) {
  const bool others = place.read == interval && place.reader != read_by && place.reader != kNobody;
  place.reader = others ? kSeveral : static_cast<int16_t>(read_by);
  place.read = interval;
}

bool check_shared(size_t at, size_t bytes, bool write, const char* what) {
  if (!is_in_shared(at, bytes, write, what)) return false;
  const auto thread = static_cast<int16_t>(current);
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Place& p = places[i];
    // Up to the first barrier several threads may clear the same place.
    if (p.written == interval && p.writer >= 0 && p.writer != thread && !(write && interval == 1))
      error("race: %s %s what another thread wrote, without a barrier [thread %d, byte %zu]", what,
            write ? "writes" : "reads", p.writer, i * 2);
    if (!write) {
      note_read(p, thread);
      continue;
    }
    if (p.read == interval && p.reader != thread && p.reader != kNobody)
      error("race: %s writes what another thread reads [thread %d, byte %zu]", what, p.reader,
            i * 2);
    if (p.leaving != 0)
      error("%s overwrites what a bulk write still reads [byte %zu]", what, i * 2);
    if (p.arriving) error("%s writes where a bulk copy arrives [byte %zu]", what, i * 2);
    p.writer = thread, p.written = interval;
    if (!p.unfenced) unfenced[thread].push_back(i);
    p.unfenced = true;
    unreleased[thread].push_back(i);
  }
  return true;
}

uint32_t shared_address(const void* pointer) {
  if (lies_in(pointer, shared_memory, kArenaBytes))
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory) +
           kSharedBase;
  const auto next = static_cast<uint32_t>(kStaticBase + 8 * static_addresses.size());
  return static_addresses.emplace(pointer, next).first->second;
}

// May read where a bulk copy arrives: no product needs what kernels load so beside their rows.
uint32_t load_shared(uint32_t address) {
  uint32_t value = uint32_t{kNaN} << 16 | kNaN;
  if (address % 4 != 0) {
    error("ld.shared at an unaligned address");
  } else if (is_in_shared(address - kSharedBase, 4, false, "ld.shared")) {
    std::memcpy(&value, shared_memory + (address - kSharedBase), 4);
  }
  return value;
}

void store_shared(uint32_t address, uint32_t value, int bytes) {
  if (address % bytes != 0) {
    error("st.shared at an unaligned address");
  } else if (check_shared(address - kSharedBase, bytes, true, "st.shared")) {
    std::memcpy(shared_memory + (address - kSharedBase), &value, bytes);
  }
}

namespace {

void check_access(const void* pointer, size_t bytes, bool write) {
  if (current == kNobody) return;
  if (lies_in(pointer, shared_memory, kArenaBytes)) {
    const size_t at = static_cast<const unsigned char*>(pointer) - shared_memory;
    check_shared(at, bytes, write, "an access");
  } else if (lies_in(pointer, global_memory(), kGlobalBytes)) {
    check_global(pointer, bytes, write, "an access");
  }
}

}  // namespace
}  // namespace emulator

// What -fsanitize=kernel-address calls for every access of a kernel.
#define DWSWAP_HOOKS(BYTES)                                 \
  extern "C" void __asan_load##BYTES##_noabort(void* at) {  \
    emulator::check_access(at, BYTES, false);               \
  }                                                         \
  extern "C" void __asan_store##BYTES##_noabort(void* at) { \
    emulator::check_access(at, BYTES, true);                \
  }
DWSWAP_HOOKS(1)
DWSWAP_HOOKS(2)
DWSWAP_HOOKS(4)
DWSWAP_HOOKS(8)
DWSWAP_HOOKS(16)
extern "C" void __asan_loadN_noabort(void* at, size_t bytes) {
  emulator::check_access(at, bytes, false);
}
extern "C" void __asan_storeN_noabort(void* at, size_t bytes) {
  emulator::check_access(at, bytes, true);
}
extern "C" void __asan_handle_no_return() {}

// What -fsanitize=alignment,bounds,shift calls where one of these is violated.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) {
  emulator::error("an access to a misaligned address");
}
extern "C" void __ubsan_handle_out_of_bounds(void*, void*) {
  emulator::error("an index outside of an array");
}
extern "C" void __ubsan_handle_shift_out_of_bounds(void*, void*, void*) {
  emulator::error("a shift by more than the width of a word");
}
