// What stands for the asm statements, the launches and the built-in functions of kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index, block_size;

constexpr int kMultiprocessors[] = {132, 7, 2, 1};  // of the devices
constexpr int kSharedPerMultiprocessor = 233472, kSharedPerBlock = 232448;
constexpr int kReservedPerBlock = 1024;  // of shared memory, by the system
extern int device;

// The dynamic shared memory of the block that runs.
constexpr size_t kArenaBytes = 256 * 1024;
extern unsigned char shared_memory[kArenaBytes];
extern int64_t shared_limit;  // bytes that a launch may ask for

struct Grid {
  int64_t blocks, threads, shared_bytes;
  void* stream;
};
void run(const char* name, const Grid& grid, void (*thread)(void*), void* data);
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, const Args&... args) {
  auto body = [&] { kernel(args...); };
  run(name, grid, [](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body);
}

void unsupported(const char* what);
uint32_t shared_address(const void* pointer);
uint32_t load_shared(uint32_t address);
void store_shared(uint32_t address, uint32_t value, int bytes);

void sync_threads();
bool sync_threads_or(bool value);
float shuffle(float value, int lane);

void load_matrices(uint32_t* x, int count, bool transposed, uint32_t address);
void store_matrices(uint32_t address, int count, const uint32_t* x);
// sums += a b: a is 16 x depth, b depth x 8. `type` is f16 or bf16.
void multiply_add(int depth, const char* type, float* sums, const uint32_t* a, const uint32_t* b);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float x);
float maximum(float x, float y);
float minimum(float x, float y);
// max.NaN or min.NaN of f16x2 or bf16x2.
uint32_t pair_function(const char* instruction, uint32_t x, uint32_t y);

void barrier_init(uint32_t barrier, int arrivals);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy_box(uint32_t target, const void* map, uint32_t barrier, int c, int w, int h, int n);
void copy_bytes(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier);
void write_box(const void* map, uint32_t source, int c, int w, int h, int n);
void write_bytes(void* target, uint32_t source, uint32_t bytes);
void fence();
void wait_for_reads();
void wait_for_writes();

}  // namespace emulator
