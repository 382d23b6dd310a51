// How sweeps over maps are launched, and why. map_sweep.cuh says what a sweep is.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "cuda/map_launch.h"

namespace cotnet {

// What a pass needs.
struct SweepNeeds {
  int items, batch;  // see below
  int steps;         // channels_last: pixels of a thread
  int coefficients;  // of a channel of an image
  int sums;          // that it leaves for each
};

struct SweepPlan {
  Launch launch;
  int64_t rows;  // N*C planes
  int64_t channels;
  int64_t plane;
  bool channels_last;
  bool aligned;  // vectors may be moved whole

  // NCHW: a block has several planes, or a chunk of one.
  int rows_per_block;
  int pieces;         // of rows that one vector may have elements of
  int team;           // lanes that add up one row together, a power of two
  int teams_per_row;

  // channels_last: a block has a slab of channels at a chunk of pixels.
  int lanes;  // vectors of channels, a power of two
  int slabs;

  int64_t units;  // of work: groups of planes, planes, or images times slabs
  int chunks;     // blocks along a plane
  int64_t chunk;  // pixels of each, the last may have fewer
};

constexpr int kSweepThreads = 256;
constexpr int kSweepImageThreads = 128;  // channels_last: coefficients and sums of a whole vector are in registers
constexpr int kSweepBytes = 48 << 10;    // of shared memory: what every GPU has without asking

// NCHW: vectors of each map that a thread has in registers at once. 48 KB under way keep the memory of an H200 busy: with 768
// threads on a multiprocessor 4 of one map or 2 of two.
template <int kInputs>
constexpr int kSweepItems = kInputs == 1 ? 4 : 2;
// channels_last: pixels of a thread whose loads go out together. 384 threads or more share a multiprocessor.
template <int kInputs>
constexpr int kSweepBatch = kInputs == 1 ? 8 : kInputs == 2 ? 4 : 2;
constexpr int kSweepSteps = 16;

namespace map_sweep {

inline void choose_planes(SweepPlan& plan, const SweepNeeds& needs, int element_bytes) {
  const int vector = 16 / element_bytes, acc_bytes = std::max(element_bytes, 4), items = needs.items;
  // A vector has elements of two rows at most, but for rows shorter than itself.
  plan.pieces = int(1 + ceil_div(vector - 1, std::min<int64_t>(plan.plane, vector)));
  // Pieces of sums, then sums of teams, then coefficients of rows.
  const auto bytes_of = [&](int threads, int teams, int rows) {
    return acc_bytes * (needs.sums * (plan.pieces * threads * items + teams) + rows * (needs.coefficients | 1));
  };
  const auto most_bytes_of = [&](int threads) {
    const int rows = planes_at_once(plan.plane, vector, threads, items);
    return bytes_of(threads, std::max(2 * rows, threads / 32), rows);
  };
  int most = kSweepThreads;
  while (most_bytes_of(most) > kSweepBytes) most -= 32;
  share_planes(plan, vector, most, items);
  const int threads = int(plan.launch.threads);
  plan.launch.shared_bytes = unsigned(bytes_of(threads, threads / plan.team, plan.rows_per_block));
}

inline void choose_images(SweepPlan& plan, const SweepNeeds& needs, int element_bytes, const DeviceNumbers& device) {
  const int vector = 16 / element_bytes, acc_bytes = std::max(element_bytes, 4);
  // As many steps as make coefficients and the merging of sums cost little; fewer where that leaves few blocks. Sums of a
  // chunk are written and read again, which costs more than a half empty GPU.
  const int64_t wanted = (needs.sums > 0 ? 1 : 8) * int64_t(device.sm_count);
  share_images(plan, vector, kSweepImageThreads, needs.batch, needs.steps, wanted);
  const int width = plan.lanes * vector, warps = int(plan.launch.threads) / 32;
  plan.launch.shared_bytes = unsigned(acc_bytes * width * (needs.coefficients + needs.sums * warps));
}

}  // namespace map_sweep

// `aligned`: every map begins at a multiple of 16 bytes.
inline SweepPlan choose_sweep(const MapProblem& p, const SweepNeeds& needs, int element_bytes, bool aligned,
                              const DeviceNumbers& device) {
  auto plan = plan_maps<SweepPlan>(p, element_bytes, aligned);
  plan.pieces = 1;
  if (plan.launch.empty()) return plan;
  if (p.channels_last)
    map_sweep::choose_images(plan, needs, element_bytes, device);
  else
    map_sweep::choose_planes(plan, needs, element_bytes);
  return plan;
}

// For what is the same in all images: those of channels_last are one long image.
inline MapProblem without_images(const MapProblem& p) {
  if (!p.channels_last || p.batch == 0) return p;
  return {1, p.channels, p.batch * p.plane, true};
}

// A thread for each of `count` results.
inline Launch choose_elements(int64_t count, int threads) {
  Launch launch;
  launch.threads = unsigned(threads);
  launch.grid_x = unsigned(ceil_div(count, threads));
  return launch;
}

}  // namespace cotnet
