#include "depthwise_conv2d/plane_strips_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

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

// Time in clocks of a multiprocessor, but for a constant. Fitted to 23,000 measurements of 728
// problems on an H200, batch 64: the cut of the least estimate takes 2 % longer than the best one
// measured of its problem, and so it does for 3,700 of 346 problems with pairs and whole rows.
double estimate(const DepthwiseConv2dParams& p, const Cut& cut, const LoopRows& loops,
                int conflicts, int element_bytes, const Device& device) {
  constexpr double kUnitInstructions = 180.0;  // of a warp, around those that compute
  constexpr double kAskInstructions = 10.0;    // of a row that may lie outside the piece
  // To write what the copy engine does not: of a vector, and of an element at either end of a unit.
  constexpr double kVectorInstructions = 13.0, kEdgeInstructions = 21.0;
  constexpr double kVectorClocks = 40.0;  // until a thread's vector is read
  // Of a unit's copy. As much with two stages as with one: what the second hides, the other blocks
  // of the multiprocessor hide anyway.
  constexpr double kLatency = 660.0, kCopyBytesPerClock = 50.0;
  constexpr double kBufferClocks = 180.0;         // to wait for the only buffer
  constexpr double kClocksPerInstruction = 0.33;  // more than it takes to issue
  constexpr double kInstructionsPerClock = 3.3;   // of all warps together
  constexpr double kUneven = 0.68;                // how much the fullest quarter counts
  constexpr double kSharedClocks = 0.57;          // per access to shared memory
  constexpr double kBytesPerClock = 20.1;         // of all copies together
  constexpr int kSectorBytes = 32;                // that memory takes at once
  constexpr double kSplitSectors = 1.04;          // where units share them
  constexpr double kFirst = 0.45;                 // of the time of the first copies
  constexpr double kBlockBytes = 1024;            // of shared memory, that every block takes
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
  const Rows known = rows_of(columns, p, element_bytes);
  const bool whole = known == Rows::kWhole;
  const int in_columns = whole ? columns : (columns - 1) * stride + kernel_w;
  const int beside = kernel_w / 2;  // of whole rows, columns at either end that are not there
  const int adds = columns * taps - (whole ? kernel_h * beside * (beside + 1) : 0);
  const int narrowed = columns / std::min(together_of(columns), 2);
  const RowAccesses row = row_accesses(cut, in_columns, known);
  const int load = row.singles + row.loads + (element_bytes == 2 ? in_columns : 0);
  const int store = row.stores + (element_bytes == 2 ? narrowed : 0);
  const int rows = loops.unrolled + loops.asking;
  const double compute = (rows + open - 1) * stride * load + (rows + 0.5 * (open - 1)) * adds +
                         rows * store + loops.asking * kAskInstructions;
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
  const double instructions = kUnitInstructions + segments * compute + write;

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
  const double alone = instructions * kClocksPerInstruction + vectors * kVectorClocks +
                       (cut.buffers == 1 ? kBufferClocks : 0.0);
  const double chain = share * (kLatency + cut.in_bytes / kCopyBytesPerClock) + (share + 1) * alone;
  // All units of a multiprocessor: blocks with a longer share are spread evenly. A quarter of it
  // issues for every fourth warp.
  const double work = std::max(units / device.multiprocessors, 1.0);
  const double quarters = 4 * std::ceil(together * warps / 4) / (together * warps);
  const double issue =
      work * warps * instructions / kInstructionsPerClock * (1.0 + kUneven * (quarters - 1.0));
  // The single elements of vectors are in a fourth of all banks.
  const int singles = row.singles * (columns == kVectorColumns ? 4 : conflicts);
  const int stores = row.stores * conflicts;
  const double accesses = segments * ((rows + open - 1) * stride *
                                          static_cast<double>(singles + row.loads * conflicts) +
                                      rows * static_cast<double>(stores));
  const double banks = work * cut.threads() / 32 * accesses * kSharedClocks;
  const double in_rows = p.in_h + (strips - 1) * std::max(kernel_h - stride, 0);
  const double memory = static_cast<double>(p.batch * p.channels) *
                        (in_rows * p.in_w * element_bytes + plane_bytes) / device.multiprocessors /
                        kBytesPerClock * (in_steps_of(kSectorBytes) ? 1.0 : kSplitSectors);
  // Until the first copies are there nothing is computed or written.
  const double first = kFirst * together * cut.stages * cut.in_bytes / kBytesPerClock;
  // What a multiprocessor does overlaps, but for what each block does alone.
  return first + chain +
         std::cbrt(issue * issue * issue + banks * banks * banks + memory * memory * memory);
}

Cut search_cut(const DepthwiseConv2dParams& p, int element_bytes, const Device& device) {
  const auto stride = static_cast<int>(p.stride_h), out_h = static_cast<int>(p.out_h);
  const auto kernel_h = static_cast<int>(p.kernel_h);
  Search<Cut> search;
  const auto consider = [&](Cut cut) {
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
  for (const int columns : {kWideColumns, 1, DWSWAP_PLANE_STRIPS_PAIRED_COLUMNS}) {
    if (!allows(columns, p, element_bytes)) continue;
    const int most_threads = max_threads(p.kernel_h, p.kernel_w, stride, columns);
    const auto all_lanes = static_cast<int>(ceil_div(p.out_w, columns));
    const int lanes = ceil_div(all_lanes, ceil_div(all_lanes, most_threads));
    // Finer steps change little where there are many.
    for (int groups = 1; groups * lanes <= most_threads && groups <= out_h;
         groups += 1 + groups / 32) {
      for (int64_t strips = 1, last = 0; strips <= out_h; strips += 1 + strips / 64) {
        const auto rows = static_cast<int>(ceil_div(int64_t{out_h}, strips));
        if (rows < groups) break;
        if (rows != last) consider({columns, 1, rows, lanes, groups});
        last = rows;
      }
      if (groups == 1) consider({columns, 1, 1, lanes, 1});  // what fits if nothing else does
      for (int planes = 2; planes <= p.channels && planes * groups * lanes <= most_threads;
           ++planes) {
        consider({columns, planes, out_h, lanes, groups});
      }
    }
  }
  return search.best();
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, const Device& device) {
  return memoized(std::pair(problem_key(p, device), element_bytes),
                  [&] { return search_cut(p, element_bytes, device); });
}

}  // namespace plane_strips
}  // namespace dwswap
