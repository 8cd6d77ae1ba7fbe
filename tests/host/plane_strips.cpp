// What threads of plane_strips compute, on the host: walk() and hold() of plane_strips_walk.cuh
// over random planes, next to sums in double. Prints how many problems it ran and what differs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

// What nvcc knows and a host compiler does not.
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#define __expf expf
using std::max;
using std::min;
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return static_cast<uint64_t>(x) * y >> 32; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return std::clamp(x, 0.0f, 1.0f); }
#include "depthwise_conv2d/plane_strips_walk.cuh"

namespace dwswap::plane_strips {
namespace {

std::mt19937 generator(0);
int between(int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(generator);
}
float draw() { return std::normal_distribution<float>()(generator); }

double hardswish(double x) { return x * std::clamp(x / 6.0 + 0.5, 0.0, 1.0); }

// A unit of so many planes, or of a strip of rows of one.
struct Unit {
  int height, width, padding;
  int planes, first_row, rows;  // of output
  int groups;                   // of threads along the rows

  int out_width(int kernel, int stride) const {
    return (width + 2 * padding - kernel) / stride + 1;
  }
};

constexpr int kGuard = 64;  // elements around a piece, NaN

template <typename T>
T* aligned(std::vector<T>& buffer) {
  auto* first = buffer.data() + kGuard / 2;
  while (reinterpret_cast<uintptr_t>(first) % kVectorBytes != 0) ++first;
  return first;
}

template <typename Traits>
bool differs(const Unit& u) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernelH, S = Traits::kStride, COLUMNS = Traits::kColumns;
  constexpr bool GATES = Traits::kForm == Form::kHardswish;
  const int out_width = u.out_width(K, S);
  const int top = u.first_row * S - u.padding;
  const int in_first = u.planes > 1 ? 0 : std::clamp(top, 0, u.height);
  const int in_end = u.planes > 1 ? u.height : std::min(top + (u.rows - 1) * S + K, u.height);
  const int in_rows = std::max(in_end - in_first, 0);

  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<T> piece(u.planes * in_rows * u.width + 2 * kGuard, T(kNan));
  std::vector<T> result(u.planes * u.rows * out_width + 2 * kGuard, T(kNan));
  T *const in = aligned(piece), *const out = aligned(result);
  for (int i = 0; i < u.planes * in_rows * u.width; ++i) in[i] = T(draw());
  float taps[K * K];
  for (float& tap : taps) tap = widen(T(draw()));
  const float bias = draw(), input_bias = GATES ? draw() : 0.0f;
  constexpr int STEP = Traits::kInputTogether;
  alignas(kVectorBytes) T row_of_zeros[Traits::kInputColumns + STEP] = {};
  const T* const zeros = row_of_zeros + (STEP - Traits::kMaxPaddingW % STEP) % STEP;

  Arguments a{};
  a.in_w = u.width, a.out_w = out_width;
  a.ragged = out_width % COLUMNS != 0;
  const int group_rows = ceil_div(u.rows, u.groups);
  for (int p = 0; p < u.planes; ++p) {
    for (int own_row = 0; own_row < u.rows; own_row += group_rows) {
      for (int own = 0; own < out_width; own += COLUMNS) {
        const int ow = std::min(own, out_width - COLUMNS);
        Walk<T> w;
        w.rows = std::min(group_rows, u.rows - own_row), w.in_rows = in_rows;
        w.ih = top + own_row * S - in_first, w.iw = ow * S - u.padding;
        w.row = in + (p * in_rows + w.ih) * u.width + w.iw;
        w.out = out + (p * u.rows + own_row) * out_width + ow;
        w.skipped = own - ow;
        if constexpr (Traits::kHolds) {
          hold<Traits>(w, taps, bias, input_bias, zeros, a);
        } else {
          walk<Traits>(w, taps, bias, input_bias, a);
        }
      }
    }
  }

  const double tolerance = sizeof(T) == 2 ? 4e-3 : 2e-5;
  const auto input = [&](int p, int y, int x) {
    if (y < 0 || y >= u.height || x < 0 || x >= u.width) return 0.0;
    const double value = widen(in[(p * in_rows + y - in_first) * u.width + x]);
    return GATES ? hardswish(value + input_bias) : value;
  };
  for (int i = 0; i < u.planes * u.rows * out_width; ++i) {
    const int x = i % out_width, y = i / out_width % u.rows, p = i / out_width / u.rows;
    double sum = bias, size = std::abs(bias);
    for (int tap = 0; tap < K * K; ++tap) {
      const double term = input(p, top + y * S + tap / K, x * S - u.padding + tap % K) * taps[tap];
      sum += term, size += std::abs(term);
    }
    const double exact = GATES ? hardswish(sum) : sum;
    if (!(std::abs(widen(out[i]) - exact) <= tolerance * (1.0 + size))) {
      std::printf(
          "%d x %d taps, stride %d, %d columns, %s: %d x %d, padding %d, %d planes, "
          "%d rows from %d: (%d, %d) is %g, not %g\n",
          K, K, S, COLUMNS, Traits::kHolds ? "held" : "walked", u.height, u.width, u.padding,
          u.planes, u.rows, u.first_row, y, x, widen(out[i]), exact);
      return true;
    }
  }
  const auto written = [](T x) { return !std::isnan(widen(x)); };
  const bool outside =
      std::any_of(result.data(), out, written) ||
      std::any_of(out + u.planes * u.rows * out_width, result.data() + result.size(), written);
  if (outside) std::printf("%d x %d taps, %d columns: written beside\n", K, K, COLUMNS);
  return outside;
}

int problems = 0, wrong = 0;

template <typename T, int K, int S, int COLUMNS, bool HOLDS, Rows ROWS = Rows::kAny>
void run() {
  constexpr int kUnits = 150;
  constexpr bool kPairs = together_of(COLUMNS) > 1 || ROWS == Rows::kEven;
  constexpr bool kWholeRow = ROWS == Rows::kWhole;
  for (int i = 0; i < kUnits; ++i) {
    Unit u{};
    u.padding = kPairs || kWholeRow ? K / 2 : between(0, K / 2);
    u.height = kWholeRow && HOLDS ? kHeldRows : between(std::max(1, K - 2 * u.padding), 30);
    u.width = kWholeRow ? COLUMNS : between(COLUMNS * S + K, COLUMNS * S + 40);
    if (kPairs && !kWholeRow) u.width -= u.width % std::max(together_of(COLUMNS), 2);
    const int out_height = (u.height + 2 * u.padding - K) / S + 1;
    u.planes = between(1, 3);
    const bool strip = u.planes == 1 && !(kWholeRow && HOLDS);
    u.first_row = strip ? between(0, out_height - 1) : 0;
    u.rows = strip ? between(1, out_height - u.first_row) : out_height;
    const int least = HOLDS ? ceil_div(u.rows, kHeldRows) : 1;
    u.groups = kWholeRow && HOLDS ? 1 : between(least, std::min(least + 2, u.rows));
    wrong += differs<Traits<T, K, K, S, COLUMNS, ROWS, HOLDS, Form::kPlain>>(u);
    wrong += differs<Traits<T, K, K, S, COLUMNS, ROWS, HOLDS, Form::kHardswish>>(u);
    problems += 2;
  }
}

template <typename T>
void run_all() {
  run<T, 3, 1, 1, false>();
  run<T, 3, 1, kWideColumns, false>();
  run<T, 3, 2, kWideColumns, false>();
  run<T, 5, 1, kWideColumns, false>();
  run<T, 5, 2, kWideColumns, false>();
  run<T, 7, 1, kWideColumns, false, Rows::kWhole>();
  run<T, 5, 1, kWideColumns, true>();
  run<T, 7, 1, kWideColumns, true>();
  run<T, 3, 1, kWideColumns, true, Rows::kWhole>();
  run<T, 5, 1, kWideColumns, true, Rows::kWhole>();
  run<T, 7, 1, kWideColumns, true, Rows::kWhole>();
}

}  // namespace
}  // namespace dwswap::plane_strips

int main() {
  using namespace dwswap::plane_strips;
  run_all<float>();
  run_all<__half>();
  run_all<__nv_bfloat16>();
  run<__half, 3, 2, kWideColumns, false, Rows::kEven>();
  run<__half, 3, 1, 6, false>();
  run<__half, 3, 1, kVectorColumns, false>();
  run<__half, 3, 1, kWholeColumns, false, Rows::kWhole>();
  run<__half, 3, 1, kVectorColumns, true>();
  run<__half, 3, 1, 10, true>();
  std::printf("%d problems, %d wrong\n", problems, wrong);
  return wrong == 0 ? 0 : 1;
}
