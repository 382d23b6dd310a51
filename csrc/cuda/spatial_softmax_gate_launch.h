// How spatial_softmax_gate is launched: which kernel, how work is cut, and why.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/problem.h"
#include "cuda/map_launch.h"

namespace cotnet {

// A row is what one softmax runs over: the plane of a channel, H*W long.
enum class GatePath {
  kTile,   // NCHW: several short rows a block, read once and held in registers
  kWhole,  // one long row, or a slab of channels of an image, a block: x is read once if shared memory holds it
  kSplit,  // several blocks for each of them, in two kernels: x is read twice
};

struct GatePlan {
  GatePath path;
  Launch launch;  // of every kernel of the path
  int64_t rows;   // N*C
  int64_t channels;
  int64_t plane;
  bool channels_last;
  bool aligned;  // vectors may be moved whole

  // kTile
  int rows_per_block;
  int team_shift;     // 2^team_shift lanes sum one row together
  int teams_per_row;  // at most a team of 32 lanes is one warp; long rows take several

  // kWhole, kSplit
  int lanes;      // channels_last: vectors of channels of a block, a power of two
  int slabs;      // channels_last: blocks that the channels of an image take
  int64_t units;  // rows, or images times slabs
  int chunks;     // blocks along the map
  int64_t chunk;  // pixels of each, the last may have fewer
  int kept;       // kWhole: steps whose vectors shared memory holds

  int width;      // rows of a unit: 1, or the channels of a slab

  // kSplit: elements of acc_t for the sums of the chunks, three for each row of each.
  int64_t partial_sums() const { return path == GatePath::kSplit ? 3 * units * chunks * width : 0; }
};

// What the kernels are compiled for; spatial_softmax_gate.cuh uses the same numbers.
//
// A tile's thread has two vectors of each of three maps under way at once: 96 bytes. With the 72 registers that this takes,
// 896 threads share a multiprocessor, 84 KB: it takes 48 KB to keep the memory of an H200 busy. 448 threads hold rows of 896
// vectors, as 56x56 in float32.
constexpr int kGateTileItems = 2;
constexpr int kGateTileThreads = 448;
// Rows: four vectors of x under way in the first sweep, two each of two maps in the second, so 48 KB for the 768 threads
// that share a multiprocessor at 80 registers: one block, or two or three if shared memory has room for as many rows.
constexpr int kGateRowThreads = 768;
// channels_last holds sums for each of a vector's channels, 16 registers and more: 640 threads of 96 registers.
// Backward has half as many again, and three maps under way: 512 threads of 128 registers.
constexpr int kGateImageThreads = 640;
constexpr int kGateImageBackwardThreads = 512;
constexpr int kGateSplitThreads = 256;  // three such blocks, or two
constexpr int kGateBatch = 4;  // steps whose loads go out together

namespace gate {

// Shared memory of a block that merges its threads' sums: three of acc_t for each warp and each channel of a slab.
inline int merge_bytes(int threads, int sums, int acc_bytes) {
  return int(round_up((threads / 32 + 1) * sums * 3 * acc_bytes, 16));
}

inline void choose_tile(GatePlan& plan, int element_bytes, int acc_bytes, bool backward) {
  const int vector = 16 / element_bytes;
  // As many rows as 512 vectors hold (256 threads, four or more blocks for each multiprocessor to keep it busy while some
  // of them sum), or the one row that is longer. Every row has a team of its own: at most one row for each thread.
  const int64_t vectors = std::max<int64_t>(512, ceil_div(plan.plane, vector) + 1);
  int64_t rows = std::clamp<int64_t>((vectors - 1) * vector / plan.plane, 1, 256);
  // Blocks that begin at a vector have no vector in part but the last: rows in eights if they are odd, and so on.
  const int64_t odd = plan.plane & -plan.plane;
  const int64_t step = vector / std::min<int64_t>(odd, vector);
  if (rows > step) rows = rows / step * step;
  rows = std::min(rows, plan.rows);
  const int64_t used = ceil_div(rows * plan.plane, vector) + (step > 1 ? 1 : 0);
  plan.rows_per_block = int(rows);
  plan.launch.threads = unsigned(round_up(std::max<int64_t>(ceil_div(used, kGateTileItems), rows), 32));
  const int warps = int(plan.launch.threads) / 32;
  while (plan.team_shift < 5 && rows << (plan.team_shift + 1) <= plan.launch.threads) ++plan.team_shift;
  plan.teams_per_row = plan.team_shift < 5 ? 1 : std::max(warps / int(rows), 1);
  set_grid(plan.launch, ceil_div(plan.rows, rows), 1);
  const int capacity = int(plan.launch.threads) * kGateTileItems * vector;
  const int sums = 3 * acc_bytes * int(plan.launch.threads + rows + vector);
  plan.launch.shared_bytes = unsigned(capacity * (element_bytes + (backward && rows > 1 ? acc_bytes : 0)) + sums);
}

// Sizes kWhole for units of so many vectors, whose blocks have plan.launch.threads: shared memory keeps as many steps as it
// can. Returns how many there are.
inline int64_t keep_steps(GatePlan& plan, int64_t vectors, int acc_bytes, bool backward, const DeviceNumbers& device) {
  const int threads = int(plan.launch.threads);
  const int merge = merge_bytes(threads, plan.width, acc_bytes);
  const int64_t step_bytes = int64_t(threads) * 16 * (backward ? 3 : 1), steps = ceil_div(vectors, threads);
  plan.kept = int(std::min(steps, (device.shared_bytes - merge) / step_bytes));
  plan.launch.shared_bytes = unsigned(merge + plan.kept * step_bytes);
  return steps;
}

// Blocks that a multiprocessor's shared memory holds; CUDA takes 1 KB for each.
inline int64_t blocks_at_once(const GatePlan& plan, const DeviceNumbers& device) {
  return (device.shared_bytes + 1024) / (int64_t(plan.launch.shared_bytes) + 1024);
}

// Pieces of a map for kSplit. Thirty-two blocks for each multiprocessor, so that the last ones to run are a small part; but
// a batch of loads for each thread at least. And every block of the second kernel reads the sums of all chunks, three of
// acc_t for each chunk and row: no more than an eighth of the maps that it moves. Kernels count a chunk in 32 bits.
inline int64_t count_chunks(const GatePlan& plan, int64_t step, int element_bytes, int acc_bytes,
                            const DeviceNumbers& device) {
  const int64_t wanted = ceil_div(int64_t(device.sm_count) * 32, plan.units);
  const int64_t by_sums = int64_t(std::sqrt(double(plan.plane) * element_bytes * 4 / (8 * 3 * acc_bytes)));
  const int64_t most = std::max<int64_t>(std::min(by_sums, plan.plane / (kGateBatch * step)), 1);
  return std::max(std::min(wanted, most), ceil_div(plan.plane, int64_t(1) << 28));
}

// Whether several blocks for each unit, which read some maps twice, take less time than one block.
inline bool is_split_better(const GatePlan& plan, int64_t steps, bool backward, const DeviceNumbers& device) {
  // Maps moved: forward 4 of which 1 again, backward 5 of which 3 again.
  const double once = backward ? 5.0 : 4.0, again = backward ? 3.0 : 1.0;
  const double not_kept = 1.0 - double(plan.kept) / double(steps);
  // Some multiprocessors run out of blocks before others; one can take half as much again as its share of the memory.
  const double working = double(plan.units) / double(round_up(plan.units, device.sm_count));
  return (once + again * not_kept) / std::min(1.5 * working, 1.0) > once + again;
}

inline void split(GatePlan& plan, int64_t chunks, int64_t step, int acc_bytes) {
  plan.path = GatePath::kSplit;
  plan.kept = 0;
  plan.chunk = round_up(ceil_div(plan.plane, chunks), step);
  plan.chunks = int(ceil_div(plan.plane, plan.chunk));
  plan.launch.shared_bytes = unsigned(merge_bytes(int(plan.launch.threads), plan.width, acc_bytes));
}

inline void choose_rows(GatePlan& plan, int element_bytes, int acc_bytes, bool backward, const DeviceNumbers& device) {
  const int vector = 16 / element_bytes;
  plan.units = plan.rows;
  // A third of the threads where shared memory has room for three rows, half for two.
  const int64_t vectors = ceil_div(plan.plane + (plan.plane % vector ? vector - 1 : 0), vector);
  int64_t steps = 0;
  for (const int part : {3, 2, 1}) {
    plan.launch.threads = unsigned(kGateRowThreads / part);
    steps = keep_steps(plan, vectors, acc_bytes, backward, device);
    if (steps == plan.kept && blocks_at_once(plan, device) >= part) break;
  }
  const int64_t step = kGateSplitThreads * vector, chunks = count_chunks(plan, step, element_bytes, acc_bytes, device);
  if (chunks == 1 || (plan.plane < int64_t(1) << 28 && !is_split_better(plan, steps, backward, device))) return;
  plan.launch.threads = kGateSplitThreads;
  split(plan, chunks, step, acc_bytes);
}

// `lanes` vectors of channels of each pixel for a block, and at most so many threads. Returns the steps of a whole map.
inline int64_t set_lanes(GatePlan& plan, int lanes, int threads, int element_bytes, int acc_bytes, bool backward,
                         const DeviceNumbers& device) {
  const int vector = 16 / element_bytes;
  plan.lanes = lanes;
  plan.width = lanes * vector;
  plan.slabs = int(ceil_div(ceil_div(plan.channels, vector), lanes));
  plan.units = plan.rows / plan.channels * plan.slabs;
  // Eight pixels for a thread, so that its part of the merging is small, but whole warps.
  const int64_t pixels = std::min<int64_t>(power_of_two_from(ceil_div(plan.plane, 8)), threads / lanes);
  plan.launch.threads = unsigned(std::max<int64_t>(pixels * lanes, 32));
  return keep_steps(plan, plan.plane * lanes, acc_bytes, backward, device);
}

inline void choose_slabs(GatePlan& plan, int element_bytes, int acc_bytes, bool backward, const DeviceNumbers& device) {
  const int vector = 16 / element_bytes, most = backward ? kGateImageBackwardThreads : kGateImageThreads;
  const int threads = most / 2;  // of one of two blocks
  // Slabs of 128 bytes of each pixel, a whole line of the cache; narrower ones, down to the 32 bytes that memory moves at
  // least, if only they fit into shared memory, two blocks at a time.
  const int widest = power_of_two_from(std::min<int64_t>(ceil_div(plan.channels, vector), 8));
  int lanes = widest;
  int64_t steps = set_lanes(plan, lanes, threads, element_bytes, acc_bytes, backward, device);
  const auto fits = [&] { return plan.kept == steps && blocks_at_once(plan, device) >= 2; };
  while (!fits() && lanes > 2) steps = set_lanes(plan, lanes /= 2, threads, element_bytes, acc_bytes, backward, device);
  // One block that keeps as much as it can, if that is a quarter or more.
  if (!fits()) steps = set_lanes(plan, lanes, most, element_bytes, acc_bytes, backward, device);
  const bool keeps = 4 * plan.kept >= steps && plan.plane < int64_t(1) << 28;
  if (keeps && !is_split_better(plan, steps, backward, device)) return;
  const GatePlan whole = plan;
  set_lanes(plan, widest, kGateSplitThreads, element_bytes, acc_bytes, backward, device);
  const int64_t step = plan.launch.threads / plan.lanes, chunks = count_chunks(plan, step, element_bytes, acc_bytes, device);
  if (chunks == 1)
    plan = whole;
  else
    split(plan, chunks, step, acc_bytes);
}

inline GatePlan choose(const MapProblem& p, int element_bytes, bool aligned, bool backward, const DeviceNumbers& device) {
  const int vector = 16 / element_bytes, acc_bytes = std::max(element_bytes, 4);
  GatePlan plan{};
  plan.rows = p.batch * p.channels;
  plan.channels = p.channels;
  plan.plane = p.plane;
  plan.channels_last = p.channels_last;
  plan.aligned = aligned && (!p.channels_last || p.channels % vector == 0);
  plan.lanes = plan.slabs = plan.chunks = plan.width = 1;
  if (plan.rows == 0 || plan.plane == 0) {
    plan.path = GatePath::kTile;
    plan.launch.grid_x = 0;
    return plan;
  }
  // What the largest tile holds, less one vector for rows that begin within one.
  if (!p.channels_last && ceil_div(p.plane, vector) < kGateTileItems * kGateTileThreads) {
    choose_tile(plan, element_bytes, acc_bytes, backward);
    return plan;
  }
  plan.path = GatePath::kWhole;
  plan.chunk = plan.plane;
  if (p.channels_last)
    choose_slabs(plan, element_bytes, acc_bytes, backward, device);
  else
    choose_rows(plan, element_bytes, acc_bytes, backward, device);
  set_grid(plan.launch, plan.units, plan.chunks);
  return plan;
}

}  // namespace gate

// `aligned`: every map begins at a multiple of 16 bytes.
inline GatePlan choose_spatial_softmax_gate_forward(const MapProblem& p, int element_bytes, bool aligned,
                                                    const DeviceNumbers& device) {
  return gate::choose(p, element_bytes, aligned, false, device);
}
inline GatePlan choose_spatial_softmax_gate_backward(const MapProblem& p, int element_bytes, bool aligned,
                                                     const DeviceNumbers& device) {
  return gate::choose(p, element_bytes, aligned, true, device);
}

}  // namespace cotnet
