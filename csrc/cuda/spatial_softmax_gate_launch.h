// How spatial_softmax_gate is launched: which kernel, how work is cut, and why.
#pragma once

#include <algorithm>

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
  int team;           // lanes that sum one row together, a power of two
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
// Rows and slabs: four vectors of x under way in the first sweep, two each of two maps in the second, so 48 KB for the 768
// threads that share a multiprocessor at 80 registers. One block of 768 when the row takes all shared memory, several
// smaller ones when it does not.
constexpr int kGateRowThreads = 768;
// channels_last holds sums for each of a vector's channels, up to 24 registers: 512 threads with twice the registers.
constexpr int kGateImageThreads = 512;
constexpr int kGateBatch = 4;          // steps whose loads go out together; shared memory holds whole batches
constexpr int kGateReserved = 20 << 10;  // shared bytes for the sums of a block, and what CUDA takes for itself

namespace gate {

// Shared memory of a block that merges its threads' sums: three of acc_t for each warp and each channel of a slab.
inline int merge_bytes(int threads, int sums, int acc_bytes) { return int(round_up((threads / 32 + 1) * sums * 3 * acc_bytes, 16)); }

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
  const int teams = int(plan.launch.threads) / 32;  // warps
  plan.team = std::min(power_of_two_upto(plan.launch.threads / rows), 32);
  plan.teams_per_row = plan.team < 32 ? 1 : std::max(teams / int(rows), 1);
  set_grid(plan.launch, ceil_div(plan.rows, rows), 1);
  const int capacity = int(plan.launch.threads) * kGateTileItems * vector;
  const int sums = 3 * acc_bytes * int(plan.launch.threads + rows + vector);
  plan.launch.shared_bytes = unsigned(capacity * (element_bytes + (backward ? acc_bytes : 0)) + sums);
}

// Bytes of shared memory that blocks of `threads` keep for each of their steps.
inline int64_t step_bytes(int threads, bool backward) { return int64_t(threads) * 16 * (backward ? 3 : 1); }

// Cuts maps into chunks for kSplit, in units of `step` pixels.
inline void choose_split(GatePlan& plan, int64_t step, const DeviceNumbers& device) {
  plan.path = GatePath::kSplit;
  plan.kept = 0;
  // Eight blocks for each multiprocessor, so that a slow one costs little; each with two batches of loads at least, so that
  // merging the sums of all chunks in every block of the second kernel stays small beside its work.
  const int64_t wanted = ceil_div(int64_t(device.sm_count) * 8, std::max<int64_t>(plan.units, 1));
  const int64_t most = std::clamp<int64_t>(plan.plane / (2 * kGateBatch * step), 1, 4096);
  // A chunk is counted in 32 bits by its kernel.
  const int64_t least = ceil_div(plan.plane, int64_t(1) << 28);
  const int64_t chunks = std::max(std::min(wanted, most), least);
  plan.chunk = round_up(ceil_div(plan.plane, chunks), step);
  plan.chunks = int(ceil_div(plan.plane, plan.chunk));
  set_grid(plan.launch, plan.units, plan.chunks);
}

// Share of the machine that works when `units` blocks run, `slots` at a time.
inline double occupancy(int64_t units, int64_t slots) {
  return double(units) / double(std::max<int64_t>(ceil_div(units, slots), 1) * slots);
}

// One block for each unit, as much of it kept as shared memory holds. Or, where that leaves multiprocessors idle for longer
// than the second reading takes, several.
inline void choose_sweep(GatePlan& plan, int64_t vectors, int acc_bytes, bool backward, int64_t step, const DeviceNumbers& device) {
  plan.path = GatePath::kWhole;
  const int threads = int(plan.launch.threads);
  const int merge = merge_bytes(threads, plan.width, acc_bytes);
  const int64_t one = step_bytes(threads, backward);
  const int64_t steps = ceil_div(vectors, threads) + (plan.channels_last ? 0 : 1);  // rows may begin within a vector
  const int64_t room = std::max<int64_t>(device.shared_bytes - kGateReserved, 0) / one;
  plan.kept = int(std::min<int64_t>(round_up(steps, kGateBatch), room / kGateBatch * kGateBatch));
  if (4 * int64_t(plan.kept) < steps) plan.kept = 0;  // not worth having a single block on a multiprocessor
  plan.chunks = 1;
  plan.chunk = plan.plane;
  plan.launch.shared_bytes = unsigned(merge + plan.kept * one);
  set_grid(plan.launch, plan.units, 1);

  const int64_t by_shared = std::max<int64_t>(device.shared_bytes / std::max<int64_t>(plan.launch.shared_bytes, 1), 1);
  const int64_t blocks = std::min<int64_t>(by_shared, std::max(1024 / threads, 1));
  // Maps moved: forward 4 of which 1 again, backward 5 of which 3 again.
  const double again = backward ? 3.0 : 1.0, once = backward ? 5.0 : 4.0;
  const double kept = double(std::min<int64_t>(plan.kept, steps)) / double(steps);
  const double whole = (once + again * (1 - kept)) / occupancy(plan.units, device.sm_count * blocks);
  if (whole <= once + again && plan.plane < int64_t(1) << 28) return;
  choose_split(plan, step, device);
  plan.launch.shared_bytes = unsigned(merge);
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
  const int64_t vectors = ceil_div(p.plane, vector);
  if (!p.channels_last) {
    // What the largest tile holds, less one vector for rows that begin within one.
    if (vectors < kGateTileItems * kGateTileThreads) {
      choose_tile(plan, element_bytes, acc_bytes, backward);
      return plan;
    }
    plan.units = plan.rows;
    // Eight steps or more for a thread, so that its part of the merging is small.
    plan.launch.threads = unsigned(std::clamp(power_of_two_upto(vectors / 8), 256, kGateRowThreads));
    choose_sweep(plan, vectors, acc_bytes, backward, int64_t(plan.launch.threads) * vector, device);
    return plan;
  }
  // Slabs of 128 bytes of each pixel, a whole line of the cache; narrower ones, down to the 32 bytes that memory moves at
  // least, if only they fit into shared memory, two blocks at a time.
  const int64_t across = ceil_div(p.channels, vector);
  plan.lanes = power_of_two_from(std::min<int64_t>(across, 8));
  const int64_t maps = backward ? 3 : 1, room = device.shared_bytes / 2 - kGateReserved;
  while (plan.lanes > 2 && p.plane * plan.lanes * 16 * maps > room) plan.lanes /= 2;
  // Whole lines again where less than a quarter would be kept.
  if (p.plane * plan.lanes * 16 * maps > 4 * int64_t(device.shared_bytes)) plan.lanes = power_of_two_from(std::min<int64_t>(across, 8));
  plan.width = plan.lanes * vector;
  plan.slabs = int(ceil_div(across, plan.lanes));
  plan.units = p.batch * plan.slabs;
  // Eight pixels for a thread, but whole warps.
  const int threads = std::clamp(power_of_two_from(ceil_div(p.plane, 8)), 1, kGateImageThreads / plan.lanes) * plan.lanes;
  plan.launch.threads = unsigned(std::max(threads, 32));
  choose_sweep(plan, p.plane * plan.lanes, acc_bytes, backward, int64_t(plan.launch.threads) / plan.lanes, device);
  return plan;
}

}  // namespace gate

// `aligned`: every map begins at a multiple of 16 bytes.
inline GatePlan choose_spatial_softmax_gate_forward(const MapProblem& p, int element_bytes, bool aligned, const DeviceNumbers& device) {
  return gate::choose(p, element_bytes, aligned, false, device);
}
inline GatePlan choose_spatial_softmax_gate_backward(const MapProblem& p, int element_bytes, bool aligned, const DeviceNumbers& device) {
  return gate::choose(p, element_bytes, aligned, true, device);
}

}  // namespace cotnet
