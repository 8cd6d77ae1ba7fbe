#include "depthwise_conv2d/plane_strips_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "common/memo.h"
#include "common/search.h"
#include "depthwise_conv2d/problem_key.h"

namespace dwswap {
namespace plane_strips {

namespace {

// How many accesses to shared memory one access of a warp becomes: lanes that want different words
// of one bank wait for each other. As many lanes as there are banks make theirs at a time: 8 those
// of 16 bytes.
int bank_conflicts(const DepthwiseConv2dParams& p, const Cut& cut, int element_bytes) {
  constexpr int kLanes = 32, kBankBytes = 4, kAllBytes = 128;
  const int bytes = cut.columns == kVectorColumns ? kVectorBytes : kBankBytes;
  const int banks = kAllBytes / bytes;
  const auto stride = static_cast<int>(p.stride_h);
  const int rows = ceil_div(cut.rows, cut.groups);
  const int64_t plane_bytes = cut.in_bytes / cut.planes;
  int accesses = 0;
  for (int first = 0; first < kLanes; first += banks) {
    std::array<std::array<int64_t, kLanes>, kLanes> words;
    std::array<int, kLanes> count{};
    int most = 1;
    for (int t = first; t < first + banks; ++t) {
      const int lane = t % cut.lanes, group = t / cut.lanes % cut.groups;
      const int plane = t / cut.lanes / cut.groups;
      const int64_t element = (int64_t{group} * rows * p.in_w + lane * cut.columns) * stride;
      const int64_t word = (plane * plane_bytes + element * element_bytes) / bytes;
      auto& others = words[word % banks];
      int& n = count[word % banks];
      if (std::find(others.begin(), others.begin() + n, word) == others.begin() + n) {
        others[n++] = word;
      }
      most = std::max(most, n);
    }
    accesses += most;
  }
  return accesses;
}

// Elements of a row that a thread loads one by one, and accesses to all others; and to its outputs.
struct RowAccesses {
  int singles, loads, stores;
};
RowAccesses row_accesses(const Cut& cut, int in_columns, Rows rows) {
  if (rows == Rows::kEven) {
    const int words = in_columns / 2;
    return {in_columns - 2 * words, words, cut.columns};
  }
  const int together = together_of(cut.columns);
  if (together == 1) return {0, in_columns, cut.columns};
  const int own = cut.columns / together;
  return {in_columns - cut.columns, own, own};
}

// How many rows one thread of a warp, or another, computes in each of the kernel's two loops: the
// unrolled one, and the one that asks whether a row lies in the piece. A warp goes through a loop
// as often as any of its threads, and the groups at the end of a piece stay less in the first.
struct LoopRows {
  int unrolled, asking;
};
LoopRows loop_rows(const DepthwiseConv2dParams& p, const Cut& cut) {
  const auto kernel_h = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
  const int open = open_rows(kernel_h, stride);
  const int unroll = unrolled_rows(kernel_h, static_cast<int>(p.kernel_w), stride);
  const auto rows = static_cast<int>(ceil_div(cut.rows, cut.groups));
  const auto groups = static_cast<int>(ceil_div(cut.rows, rows));  // that have any
  // Of input, from the first row that the piece's outputs ask for; of strips, one in the middle.
  const auto in_rows = static_cast<int>(cut.rows >= p.out_h ? p.in_h + p.padding_h
                                                            : (cut.rows - 1) * stride + kernel_h);
  LoopRows most{};
  for (int group = std::max(groups - 2, 0); group < groups; ++group) {
    const int first = group * rows, own = std::min(rows, cut.rows - first);
    const int inside = std::max(in_rows - (first + open - 1) * stride, 0) / stride;
    const int unrolled = std::min(own, inside) / unroll * unroll;
    most.unrolled = std::max(most.unrolled, unrolled);
    most.asking = std::max(most.asking, own - unrolled);
  }
  return most;
}

// Of a thread that holds so many rows: the rows of input that it loads, and the rows of taps that
// it adds up, over KH; those for sums beyond its rows with them, until it ends.
struct HeldRows {
  int loaded;
  double added;
};
HeldRows held_rows(const DepthwiseConv2dParams& p, int rows, bool plane) {
  const auto kernel_h = static_cast<int>(p.kernel_h), beside = kernel_h / 2;
  if (plane) return {rows, rows - static_cast<double>(beside * (beside + 1)) / kernel_h};
  int added = rows * kernel_h;
  for (int beyond = rows; beyond < kHeldRows; ++beyond)
    added += std::max(rows + kernel_h - 1 - beyond, 0);
  return {rows + kernel_h - 1, static_cast<double>(added) / kernel_h};
}

// What the estimate below counts with: instructions, clocks of a multiprocessor, and factors.
struct Costs {
  double unit_instructions;       // of a warp, around those that compute
  double latency;                 // of a unit's copy
  double copy_bytes_per_clock;    // of one copy
  double second_stage;            // how much of a copy's time it leaves
  double buffer_clocks;           // to wait for the only buffer
  double clocks_per_instruction;  // of a warp alone, more than it takes to issue
  double instructions_per_clock;  // of all warps together
  double uneven;                  // how much the fullest quarter counts
  double shared_clocks;           // per access to shared memory
  double first;                   // of the time of the first copies
  double overlap;                 // exponent of the norm of what goes on at once
  double scale;                   // of all of it, next to that of the others
  double read_twice = 0.0;        // what a unit reads beyond what it writes, over that
  // Where the code is longer than the instruction cache, by the square of its length in thousands:
  double lone_warp = 0.0;  // in a block of its own: others run the same code a little later
  double crowd = 0.0;      // per 8 warps of a multiprocessor beyond 8
};

// Fitted on an H200, batch 64. Of the cuts measured of a problem, the one of the least estimate
// takes 2 % longer than the best where threads walk (27,000 measurements of 1070 problems) or have
// a plane, 3 % where they hold their rows (9,000 of 310).
constexpr Costs kWalking{
    .unit_instructions = 180,
    .latency = 660,
    .copy_bytes_per_clock = 50,
    .second_stage = 1.0,
    .buffer_clocks = 180,
    .clocks_per_instruction = 0.33,
    .instructions_per_clock = 3.3,
    .uneven = 0.68,
    .shared_clocks = 0.57,
    .first = 0.45,
    .overlap = 3.0,
    .scale = 1.0,
};
constexpr Costs kHoldingFewTaps{
    .unit_instructions = 893,
    .latency = 941,
    .copy_bytes_per_clock = 82,
    .second_stage = 1.18,
    .buffer_clocks = 381,
    .clocks_per_instruction = 0.077,
    .instructions_per_clock = 3.67,
    .uneven = 0.31,
    .shared_clocks = 0.95,
    .first = 1.99,
    .overlap = 6.5,
    .scale = 0.783,
};
constexpr Costs kHoldingManyTaps{
    .unit_instructions = 640,
    .latency = 103,
    .copy_bytes_per_clock = 8.17,
    .second_stage = 0.231,
    .buffer_clocks = 125,
    .clocks_per_instruction = 0.02,
    .instructions_per_clock = 4.0,
    .uneven = 1.4,
    .shared_clocks = 0.957,
    .first = 0.021,
    .overlap = 6.25,
    .scale = 0.95,
    .read_twice = 1.93,
    .lone_warp = 0.01,
    .crowd = 0.033,
};

const Costs& costs_of(const DepthwiseConv2dParams& p, const Cut& cut, bool plane) {
  if (plane || !cut.holds) return kWalking;
  return has_many_taps(p.kernel_h, p.kernel_w) ? kHoldingManyTaps : kHoldingFewTaps;
}

// Time in clocks of a multiprocessor, but for a constant.
double estimate(const DepthwiseConv2dParams& p, const Cut& cut, const LoopRows& loops,
                int conflicts, int element_bytes, const Device& device) {
  constexpr double kAskInstructions = 10.0;  // of a row that may lie outside the piece
  // To write what the copy engine does not: of a vector, and of an element at either end of a unit.
  constexpr double kVectorInstructions = 13.0, kEdgeInstructions = 21.0;
  constexpr double kVectorClocks = 40.0;   // until a thread's vector is read
  constexpr double kBytesPerClock = 20.1;  // of all copies together
  constexpr int kSectorBytes = 32;         // that memory takes at once
  constexpr double kSplitSectors = 1.04;   // where units share them
  constexpr double kSplitLines = 1.03;     // where strips that share lines come in runs
  constexpr double kBlockBytes = 1024;     // of shared memory, that every block takes
  constexpr double kRegisters = 64 * 1024;
  const int columns = cut.columns;
  const auto kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const auto stride = static_cast<int>(p.stride_h);
  const int taps = kernel_h * kernel_w, open = open_rows(kernel_h, stride);
  const auto warps = static_cast<int>(ceil_div(cut.threads(), 32));
  const auto segments = static_cast<int>(ceil_div(p.out_w, int64_t{cut.lanes} * columns));
  const int64_t plane_bytes = p.out_h * p.out_w * element_bytes;

  // Loads, conversions (of half precision), multiply-adds and stores; the rows above the first one
  // of a thread contribute to fewer.
  const Rows known = rows_of(columns, cut.holds, p, element_bytes);
  const bool whole = known == Rows::kWhole, plane = cut.holds && whole;
  const Costs& costs = costs_of(p, cut, plane);
  const int in_columns = whole ? columns : (columns - 1) * stride + kernel_w;
  const int beside = kernel_w / 2;  // of whole rows, columns at either end that are not there
  const int adds = columns * taps - (whole ? kernel_h * beside * (beside + 1) : 0);
  const int narrowed = columns / std::min(together_of(columns), 2);
  const RowAccesses row = row_accesses(cut, in_columns, known);
  const int load = row.singles + row.loads + (element_bytes == 2 ? in_columns : 0);
  const int store = row.stores + (element_bytes == 2 ? narrowed : 0);
  const int rows = loops.unrolled + loops.asking;
  double compute = 0.0;
  if (cut.holds) {
    const HeldRows held = held_rows(p, rows, plane);
    compute = held.loaded * load + held.added * adds + rows * store;
  } else {
    compute = (rows + open - 1) * stride * load + (rows + 0.5 * (open - 1)) * adds + rows * store +
              loops.asking * kAskInstructions;
  }
  // The copy engine writes what begins and ends at a vector in every image.
  const auto in_steps_of = [&](int bytes) {
    const int64_t image_bytes = (cut.planes > 1 ? p.channels : 1) * plane_bytes;
    return cut.out_bytes % bytes == 0 && image_bytes % bytes == 0;
  };
  const bool engine = in_steps_of(kVectorBytes);
  const int64_t vectors = engine ? 0 : ceil_div(cut.out_bytes, kVectorBytes * 32 * warps);
  const double write =
      engine ? 0.0
             : vectors * kVectorInstructions + kVectorBytes / element_bytes * kEdgeInstructions;
  const double instructions = costs.unit_instructions + segments * compute + write;

  const int limit = max_threads(kernel_h, kernel_w, stride, columns) *
                    resident_blocks(kernel_h, kernel_w, stride, columns);
  const double registers = columns > 1  ? std::floor(kRegisters / (8.0 * limit)) * 8.0
                           : taps <= 9  ? 64
                           : taps <= 25 ? 80
                                        : 112;
  const double shared = static_cast<double>(cut.shared_bytes()) + kBlockBytes;
  const double resident =
      std::floor(std::min({32.0, device.shared_per_multiprocessor / shared,
                           kRegisters / (registers * 32 * warps), 64.0 / warps}));
  const auto strips = static_cast<double>(ceil_div(p.out_h, cut.rows));
  const double units = static_cast<double>(ceil_div(p.channels, cut.planes)) * p.batch * strips;
  const double blocks = std::min(units, std::max(resident, 1.0) * device.multiprocessors);
  const double share = std::ceil(units / blocks);
  const double together = std::ceil(blocks / device.multiprocessors);

  // One unit of a block after the other. Nothing runs beside the computation of the last one.
  const double alone = instructions * costs.clocks_per_instruction + vectors * kVectorClocks +
                       (cut.buffers == 1 ? costs.buffer_clocks : 0.0);
  const double copy = (costs.latency + cut.in_bytes / costs.copy_bytes_per_clock) *
                      (cut.stages > 1 ? costs.second_stage : 1.0);
  const double chain = share * copy + (share + 1) * alone;
  // All units of a multiprocessor: blocks with a longer share are spread evenly. A quarter of it
  // issues for every fourth warp.
  const double work = std::max(units / device.multiprocessors, 1.0);
  const double quarters = 4 * std::ceil(together * warps / 4) / (together * warps);
  const double length = segments * compute / 1000;
  const double crowd = std::max(resident * warps / 8 - 1.0, 0.0);
  const double twice = std::max(static_cast<double>(cut.in_bytes) / cut.out_bytes - 1.0, 0.0);
  const double issue = work * warps * instructions / costs.instructions_per_clock *
                       (1.0 + costs.uneven * (quarters - 1.0)) *
                       (1.0 + length * length * (costs.lone_warp / warps + costs.crowd * crowd)) *
                       (1.0 + costs.read_twice * twice);
  // The single elements of vectors are in a fourth of all banks.
  const int singles = row.singles * (columns == kVectorColumns ? 4 : conflicts);
  const int stores = row.stores * conflicts;
  const double accesses = segments * ((rows + open - 1) * stride *
                                          static_cast<double>(singles + row.loads * conflicts) +
                                      rows * static_cast<double>(stores));
  const double banks = work * cut.threads() / 32 * accesses * costs.shared_clocks;
  const double in_rows = p.in_h + (strips - 1) * std::max(kernel_h - stride, 0);
  const double memory = static_cast<double>(p.batch * p.channels) *
                        (in_rows * p.in_w * element_bytes + plane_bytes) / device.multiprocessors /
                        kBytesPerClock * (in_steps_of(kSectorBytes) ? 1.0 : kSplitSectors) *
                        (order_of(p, cut) == Order::kMemory ? kSplitLines : 1.0);
  // Until the first copies are there nothing is computed or written.
  const double first = costs.first * together * cut.stages * cut.in_bytes / kBytesPerClock;
  // What a multiprocessor does overlaps, but for what each block does alone.
  const double overlap = costs.overlap;
  return costs.scale *
         (first + chain +
          std::pow(std::pow(issue, overlap) + std::pow(banks, overlap) + std::pow(memory, overlap),
                   1.0 / overlap));
}

Cut search_cut(const DepthwiseConv2dParams& p, int element_bytes, const Device& device) {
  const auto stride = static_cast<int>(p.stride_h), out_h = static_cast<int>(p.out_h);
  const auto kernel_h = static_cast<int>(p.kernel_h);
  Search<Cut> search;
  const auto consider = [&](Cut cut) {
    if (cut.holds && ceil_div(cut.rows, cut.groups) > kHeldRows) return;
    const bool plane = cut.holds && rows_of(cut.columns, true, p, element_bytes) == Rows::kWhole;
    if (plane && (cut.rows < out_h || cut.groups > 1)) return;
    const int64_t in_rows =
        cut.planes > 1 ? p.in_h : std::min(int64_t{cut.rows - 1} * stride + kernel_h, p.in_h);
    cut.in_bytes = cut.planes * in_rows * p.in_w * element_bytes;
    cut.out_bytes = int64_t{cut.planes} * cut.rows * p.out_w * element_bytes;
    if (std::max(cut.in_bytes, cut.out_bytes) > kStageBytes) return;
    const int conflicts = bank_conflicts(p, cut, element_bytes);
    const LoopRows loops = loop_rows(p, cut);
    constexpr int kCopies[][2] = {{1, 1}, {2, 1}, {2, 2}};
    for (const auto& [stages, buffers] : kCopies) {
      cut.stages = stages, cut.buffers = buffers;
      if (cut.shared_bytes() + kStaticBytes > device.shared_per_block) continue;
      search.consider(estimate(p, cut, loops, conflicts, element_bytes, device), cut);
    }
  };
  const auto consider_all = [&](int columns, bool holds) {
    const int most_threads = max_threads(p.kernel_h, p.kernel_w, stride, columns);
    const auto all_lanes = static_cast<int>(ceil_div(p.out_w, columns));
    const int lanes = ceil_div(all_lanes, ceil_div(all_lanes, most_threads));
    // Finer steps change little where there are many.
    for (int groups = 1; groups * lanes <= most_threads && groups <= out_h;
         groups += 1 + groups / 32) {
      for (int64_t strips = 1, last = 0; strips <= out_h; strips += 1 + strips / 64) {
        const auto rows = static_cast<int>(ceil_div(int64_t{out_h}, strips));
        if (rows < groups) break;
        if (rows != last) consider({columns, holds, 1, rows, lanes, groups});
        last = rows;
      }
      if (groups == 1) consider({columns, holds, 1, 1, lanes, 1});  // fits if nothing else does
      for (int planes = 2; planes <= p.channels && planes * groups * lanes <= most_threads;
           ++planes) {
        consider({columns, holds, planes, out_h, lanes, groups});
      }
    }
  };
  for (const int columns : {kWideColumns, 1, DWSWAP_PLANE_STRIPS_PAIRED_COLUMNS}) {
    if (!allows(columns, p, element_bytes)) continue;
    consider_all(columns, false);
    if (may_hold(columns, p, element_bytes)) consider_all(columns, true);
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, const Device& device) {
  // Activations matter for whether threads may hold their rows.
  const bool any_form =
      compiled_form(form_of(p), p.kernel_h, p.kernel_w, kWideColumns) == Form::kAny;
  return memoized(std::tuple(problem_key(p, device), element_bytes, any_form),
                  [&] { return search_cut(p, element_bytes, device); });
}

}  // namespace plane_strips
}  // namespace dwswap
