// What the parts of the emulator share. Blocks run one after another, and so do the threads of a
// block: one runs until it has to wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

// ---- memory.cpp

struct Report {
  int errors = 0;
  std::string messages;  // the first of every kind
};
extern Report report;
[[gnu::format(printf, 1, 2)]] void error(const char* format, ...);

constexpr uint32_t kSharedBase = 1024;          // the address of shared_memory
constexpr uint32_t kStaticBase = 0x40000000;    // and that of variables that are __shared__
constexpr int16_t kNobody = -1, kSeveral = -2;  // for a thread

// What is known of two bytes of shared memory.
struct Place {
  int16_t writer, reader;
  uint32_t written, read;  // in which interval
  uint16_t leaving;        // bulk writes that have not read it yet
  bool arriving;           // a bulk copy is under way
  bool unfenced;           // written by a thread, and no fence since
};
extern Place places[kArenaBytes / 2];
extern size_t shared_bytes;  // of the launch
extern uint32_t interval;    // between two barriers of the block

void clear_shared_memory(size_t bytes);
void clear_tensors();
// Copies a tensor to global memory, `offset` elements behind an aligned address. NaN is around it.
unsigned char* place_tensor(const char* name, const void* elements, int64_t count, int64_t offset,
                            bool writable);
bool check_global(const void* pointer, size_t bytes, bool write, const char* what);
// `read_by`: of the current interval.
void note_read(Place& place, int read_by);
bool check_shared(size_t at, size_t bytes, bool write, const char* what);
bool is_in_shared(size_t at, size_t bytes, bool write, const char* what);
extern std::vector<uint8_t> written;  // how often each output was

// ---- threads.cpp

extern bool executes;                       // or kernels are named, and not run
extern std::string kernel_name;             // of the last launch
extern int current;                         // the thread that runs, or kNobody
extern std::vector<uint32_t> unfenced[];    // places of each thread
extern std::vector<uint32_t> unreleased[];  // written in this interval
extern bool recomputing;                    // since a __syncthreads_or() that found something
extern int recomputed;                      // blocks that were
extern std::mt19937 random_bits;
// An error after which the block cannot go on.
[[noreturn, gnu::format(printf, 1, 2)]] void give_up(const char* format, ...);
// When all lanes of the warp are there, runs complete(their arguments).
void collective(const char* name, void* argument, void (*complete)(void** arguments));
void wait_for_phase(uint32_t barrier, uint32_t parity);
void wake_waiting(uint32_t barrier, uint32_t phase);

// ---- copies.cpp

// When bulk copies arrive.
enum class Timing { kLate, kAtOnce, kAnyTime };
extern Timing timing;
void begin_copies();
bool any_arriving();
void let_one_arrive();
void check_end_of_thread(int thread);
void check_end_of_block();

}  // namespace emulator
