// The threads of a block: each has a stack of its own, and runs until it has to wait.
#include <ucontext.h>

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <memory>

#include "state.h"

namespace emulator {

constexpr int kMostThreads = 1024, kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;

Index thread_index, block_index, block_size;
int device;
int64_t shared_limit;
bool executes;
std::string kernel_name;
int current = kNobody;
std::vector<uint32_t> unfenced[kMostThreads], unreleased[kMostThreads];
bool recomputing;
int recomputed;
std::mt19937 random_bits;

namespace {

enum State { kReady, kAtCollective, kAtBarrier, kAtPhase, kDone };

struct Thread {
  State state;
  bool started;
  ucontext_t first;  // swapcontext() alone would take a system call per switch
  jmp_buf latest;
  uint32_t barrier, parity;  // that it waits for
};
Thread threads[kMostThreads];
int thread_count;
jmp_buf scheduler;
void (*entry)(void*);
void* entry_data;
bool gave_up;

struct Warp {
  const char* collective;
  int arrived;
  void* arguments[kLanes];
};
Warp warps[kMostThreads / kLanes];

struct {
  const char* name;
  int arrived;
  bool any, result;
} block_barrier;

void wait_as(State state) {
  threads[current].state = state;
  if (_setjmp(threads[current].latest) == 0) _longjmp(scheduler, 1);
}

void run_thread() {
  entry(entry_data);
  wait_as(kDone);
}

void resume(int thread) {
  current = thread, thread_index.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (threads[thread].started) _longjmp(threads[thread].latest, 1);
  threads[thread].started = true;
  setcontext(&threads[thread].first);
}

bool wait_for_block(const char* name, bool value) {
  auto& b = block_barrier;
  if (b.arrived == 0) {
    b.name = name, b.any = false;
  } else if (b.name != name) {
    give_up("threads of a block are at %s and %s", b.name, name);
  }
  b.any |= value;
  if (++b.arrived < thread_count) {
    wait_as(kAtBarrier);
    return b.result;
  }
  b.arrived = 0, b.result = b.any;
  ++interval;
  for (int i = 0; i < thread_count; ++i) {
    unreleased[i].clear();
    threads[i].state = kReady;
  }
  return b.result;
}

}  // namespace

void give_up(const char* format, ...) {
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error("%s", text);
  gave_up = true;
  _longjmp(scheduler, 1);
}

void collective(const char* name, void* argument, void (*complete)(void** arguments)) {
  const int first = current / kLanes * kLanes;
  Warp& warp = warps[current / kLanes];
  if (warp.arrived == 0) {
    warp.collective = name;
  } else if (warp.collective != name) {
    give_up("lanes of a warp are at %s and %s", warp.collective, name);
  }
  warp.arguments[current % kLanes] = argument;
  if (++warp.arrived < kLanes) return wait_as(kAtCollective);
  warp.arrived = 0;
  complete(warp.arguments);
  for (int i = first; i < first + kLanes; ++i) threads[i].state = kReady;
}

float shuffle(float value, int lane) {
  struct Exchange {
    float value, result;
    int lane;
  } mine{value, 0.0f, lane};
  collective("shfl.sync", &mine, [](void** arguments) {
    auto** lanes = reinterpret_cast<Exchange**>(arguments);
    for (int i = 0; i < kLanes; ++i) lanes[i]->result = lanes[lanes[i]->lane % kLanes]->value;
  });
  return mine.result;
}

void sync_threads() { wait_for_block("__syncthreads", false); }
bool sync_threads_or(bool value) {
  const bool any = wait_for_block("__syncthreads_or", value);
  if (any && !recomputing) recomputing = true, ++recomputed;
  return any;
}

void wait_for_phase(uint32_t barrier, uint32_t parity) {
  threads[current].barrier = barrier, threads[current].parity = parity;
  wait_as(kAtPhase);
}
void wake_waiting(uint32_t barrier, uint32_t phase) {
  for (Thread& t : threads) {
    if (t.state == kAtPhase && t.barrier == barrier && phase % 2 != t.parity) t.state = kReady;
  }
}

namespace {

void begin_block(int64_t bytes) {
  static const auto stacks = std::make_unique<unsigned char[]>(kMostThreads * kStackBytes);
  clear_shared_memory(bytes);
  begin_copies();
  block_barrier = {};
  gave_up = recomputing = false;
  for (Warp& warp : warps) warp.arrived = 0;
  for (int i = 0; i < kMostThreads; ++i) threads[i].state = kDone;
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    t.state = kReady, t.started = false;
    getcontext(&t.first);
    t.first.uc_stack.ss_sp = &stacks[i * kStackBytes];
    t.first.uc_stack.ss_size = kStackBytes;
    makecontext(&t.first, run_thread, 0);
    unfenced[i].clear(), unreleased[i].clear();
  }
}

// Warps in any order, each for a while.
void run_block() {
  while (!gave_up) {
    std::vector<int> ready;
    int counts[kDone + 1] = {};
    for (int i = 0; i < thread_count; ++i) {
      const State state = threads[i].state;
      ++counts[state];
      if (state == kReady && (ready.empty() || ready.back() != i / kLanes))
        ready.push_back(i / kLanes);
    }
    if (counts[kDone] == thread_count) return check_end_of_block();
    const bool now = ready.empty() || (timing == Timing::kAnyTime && random_bits() % 8 == 0);
    if (now && any_arriving()) {
      let_one_arrive();
      continue;
    }
    if (ready.empty()) {
      error(
          "deadlock: %d threads at an instruction of a warp, %d at a barrier, %d at an mbarrier, "
          "%d done",
          counts[kAtCollective], counts[kAtBarrier], counts[kAtPhase], counts[kDone]);
      return;
    }
    const int first = ready[random_bits() % ready.size()] * kLanes;
    bool ran = true;
    for (int turns = 1 + random_bits() % 64; ran && turns > 0; --turns) {
      ran = false;
      for (int i = first; i < first + kLanes && !gave_up; ++i) {
        if (threads[i].state != kReady) continue;
        resume(i);
        current = kNobody, ran = true;
        if (threads[i].state == kDone) check_end_of_thread(i);
      }
    }
  }
}

}  // namespace

void run(const char* name, const Grid& grid, void (*thread)(void*), void* data) {
  kernel_name = name;
  if (!executes) return;
  entry = thread, entry_data = data;
  if (grid.blocks < 1 || grid.threads < 1 || grid.threads > kMostThreads ||
      grid.threads % kLanes != 0)
    return error("a launch of %zd blocks of %zd threads", grid.blocks, grid.threads);
  if (grid.shared_bytes > shared_limit)
    return error("a launch with %zd bytes of shared memory, of which %zd are allowed",
                 grid.shared_bytes, shared_limit);
  thread_count = static_cast<int>(grid.threads);
  block_size.x = thread_count;
  gave_up = false;
  for (int64_t i = 0; i < grid.blocks && !gave_up; ++i) {
    block_index.x = i;
    begin_block(grid.shared_bytes);
    run_block();
  }
}

}  // namespace emulator
