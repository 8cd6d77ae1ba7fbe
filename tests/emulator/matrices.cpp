// The instructions of the tensor cores, with the layouts of the PTX manual, and numbers of 16 bits.
#include <array>
#include <cmath>
#include <cstring>

#include "cuda_runtime.h"
#include "state.h"

namespace emulator {

namespace {

using Table = std::array<float, 65536>;
template <float (*WIDEN)(uint16_t)>
const Table& table() {
  static const Table values = [] {
    Table all;
    for (uint32_t i = 0; i < all.size(); ++i) all[i] = WIDEN(static_cast<uint16_t>(i));
    return all;
  }();
  return values;
}
const Table& table_of(bool bfloat16) {
  return bfloat16 ? table<bfloat16_to_float>() : table<half_to_float>();
}

constexpr int kRows = 16, kColumns = 8, kMostDepth = 16;
struct Product {
  int depth;
  const Table* values;
  float* sums;
  const uint32_t *a, *b;
};

void complete_product(void** arguments) {
  auto** const lanes = reinterpret_cast<Product**>(arguments);
  const int depth = lanes[0]->depth;
  float a[kRows][kMostDepth], b[kMostDepth][kColumns], sums[kRows][kColumns] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *lanes[lane];
    const auto element = [&](uint32_t pair, int e) { return (*p.values)[pair >> 16 * e & 0xffff]; };
    const int row = lane / 4;
    for (int part = 0; part < depth / 8; ++part) {
      for (int e = 0; e < 2; ++e) {
        const int k = 8 * part + 2 * (lane % 4) + e;
        a[row][k] = element(p.a[2 * part], e);
        a[row + 8][k] = element(p.a[2 * part + 1], e);
        b[k][row] = element(p.b[part], e);
      }
    }
  }
  for (int k = 0; k < depth; ++k)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sums[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e)
      lanes[lane]->sums[e] += sums[lane / 4 + e / 2 * 8][2 * (lane % 4) + e % 2];
}

struct Matrices {
  uint32_t* x;
  int count;
  bool transposed;
  uint32_t address;
};

// Row `lane % 8` of a matrix, whose address is that lane's.
unsigned char* row_of(Matrices** lanes, int lane, bool write, const char* name) {
  static unsigned char nowhere[16];
  const uint32_t at = lanes[lane]->address - kSharedBase;
  const int completing = current;
  current = completing / 32 * 32 + lane;  // the one that reads or writes
  if (at % sizeof nowhere != 0) error("%s at an unaligned address", name);
  const bool valid = at % sizeof nowhere == 0 && check_shared(at, sizeof nowhere, write, name);
  current = completing;
  return valid ? shared_memory + at : nowhere;
}

void complete_load(void** arguments) {
  auto** const lanes = reinterpret_cast<Matrices**>(arguments);
  const bool transposed = lanes[0]->transposed;
  for (int i = 0; i < 8 * lanes[0]->count; ++i) {
    uint16_t row[8];
    std::memcpy(row, row_of(lanes, i, false, "ldmatrix"), sizeof row);
    for (int j = 0; j < 8; ++j) {
      const int r = transposed ? j : i % 8, c = transposed ? i % 8 : j;
      uint32_t& x = lanes[4 * r + c / 2]->x[i / 8];
      x = c % 2 == 0 ? (x & 0xffff0000u) | row[j] : (x & 0xffffu) | uint32_t{row[j]} << 16;
    }
  }
}

void complete_store(void** arguments) {
  auto** const lanes = reinterpret_cast<Matrices**>(arguments);
  for (int i = 0; i < 8 * lanes[0]->count; ++i) {
    unsigned char* const row = row_of(lanes, i, true, "stmatrix");
    for (int j = 0; j < 4; ++j) std::memcpy(row + 4 * j, &lanes[4 * (i % 8) + j]->x[i / 8], 4);
  }
}

}  // namespace

void multiply_add(int depth, const char* type, float* sums, const uint32_t* a, const uint32_t* b) {
  Product mine{depth, &table_of(type[0] == 'b'), sums, a, b};
  collective(depth == 16 ? "mma.m16n8k16" : "mma.m16n8k8", &mine, complete_product);
}

void load_matrices(uint32_t* x, int count, bool transposed, uint32_t address) {
  Matrices mine{x, count, transposed, address};
  collective(count == 4 ? "ldmatrix.x4" : "ldmatrix.x2", &mine, complete_load);
}

void store_matrices(uint32_t address, int count, const uint32_t* x) {
  Matrices mine{const_cast<uint32_t*>(x), count, false, address};
  collective(count == 4 ? "stmatrix.x4" : "stmatrix.x2", &mine, complete_store);
}

float half_to_float(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  const float magnitude = exponent == 0      ? static_cast<float>(fraction) * 0x1p-24f
                          : exponent == 0x1f ? (fraction == 0 ? INFINITY : NAN)
                                             : std::ldexp(static_cast<float>(fraction + 0x400),
                                                          static_cast<int>(exponent) - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f)
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  // To the nearest, of two to the even one; the exponent's bias becomes 15 for 127.
  const uint32_t bits = __float_as_uint(magnitude) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of zeros of both signs the larger is the positive one.
float maximum(float x, float y) {
  if (std::isnan(x) || std::isnan(y)) return NAN;
  return x < y || (x == y && std::signbit(x)) ? y : x;
}
float minimum(float x, float y) { return -maximum(-x, -y); }

uint32_t pair_function(const char* instruction, uint32_t x, uint32_t y) {
  const bool bfloat16 = std::strstr(instruction, "bf16") != nullptr;
  const auto function = std::strncmp(instruction, "max", 3) == 0 ? maximum : minimum;
  const Table& values = table_of(bfloat16);
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float value = function(values[x >> shift & 0xffff], values[y >> shift & 0xffff]);
    const uint16_t bits = bfloat16 ? float_to_bfloat16(value) : float_to_half(value);
    result |= uint32_t{bits} << shift;
  }
  return result;
}

}  // namespace emulator
