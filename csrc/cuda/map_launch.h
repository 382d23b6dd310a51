// What the choosers of spatial_softmax_gate, context_fusion and sweeps share.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "core/window.h"
#include "cuda/launch.h"

namespace cotnet {

inline int power_of_two_upto(int64_t n) {
  int p = 1;
  while (2 * int64_t(p) <= n) p *= 2;
  return p;
}
inline int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The x axis counts the pieces of a map, the others the units of work: together they count further than 32 bits do.
inline void set_grid(Launch& launch, int64_t units, int64_t pieces) {
  launch.grid_x = unsigned(pieces);
  launch.grid_z = unsigned(ceil_div(units, 65535));
  launch.grid_y = launch.grid_z == 0 ? 0 : unsigned(ceil_div(units, launch.grid_z));
}

// How context_fusion and sweeps share out maps among blocks. The plan of either has the fields that are set here; what else a
// block needs, its shared memory above all, the plan's own file adds.

// Not shared out yet, and nothing to launch where maps are empty. `aligned`: every map begins at a multiple of 16 bytes.
template <class Plan>
Plan plan_maps(const MapProblem& p, int element_bytes, bool aligned) {
  Plan plan{};
  plan.rows = p.batch * p.channels;
  plan.channels = p.channels;
  plan.plane = p.plane;
  plan.channels_last = p.channels_last;
  plan.aligned = aligned && (!p.channels_last || p.channels % (16 / element_bytes) == 0);
  plan.rows_per_block = plan.team = plan.teams_per_row = plan.lanes = plan.slabs = 1;
  if (plan.rows == 0 || plan.plane == 0) plan.launch.grid_x = 0;
  return plan;
}

// NCHW: elements that threads have room for, in `items` vectors each, as a range may begin within a vector; and the whole
// planes among them, each with a thread at least.
inline int64_t plane_room(int vector, int threads, int items) { return (int64_t(threads) * items - 1) * vector; }
inline int planes_at_once(int64_t plane, int vector, int threads, int items) {
  return int(std::clamp<int64_t>(plane_room(vector, threads, items) / plane, 1, threads));
}

// NCHW: a block has as many planes as there is room for, or a chunk of one.
template <class Plan>
void share_planes(Plan& plan, int vector, int most_threads, int items) {
  const int64_t room = plane_room(vector, most_threads, items);
  if (plan.plane <= room) {
    int64_t rows = planes_at_once(plan.plane, vector, most_threads, items);
    // Blocks that begin at a vector have no vector in part but the last.
    const int64_t step = vector / std::min<int64_t>(plan.plane & -plan.plane, vector);
    if (rows > step) rows = rows / step * step;
    plan.rows_per_block = int(std::min(rows, plan.rows));
    plan.chunk = plan.plane;
  } else {
    // Pieces of one size: what is left over for the last one would keep a block half busy.
    const int64_t line = 8 * vector;  // 128 bytes
    const int64_t chunks = ceil_div(plan.plane, room / line * line);
    plan.chunk = round_up(ceil_div(plan.plane, chunks), line);
  }
  plan.chunks = int(ceil_div(plan.plane, plan.chunk));
  const int64_t used = ceil_div(plan.rows_per_block * plan.chunk, vector) + 1;
  plan.launch.threads = unsigned(round_up(std::max<int64_t>(ceil_div(used, items), plan.rows_per_block), 32));
  const int threads = int(plan.launch.threads), rows = plan.rows_per_block;
  plan.team = std::min(power_of_two_upto(threads / rows), 32);
  plan.teams_per_row = plan.team < 32 ? 1 : std::max(threads / 32 / rows, 1);
  plan.units = ceil_div(plan.rows, rows);
  set_grid(plan.launch, plan.units, plan.chunks);
}

// channels_last: a thread has `most_steps` pixels; fewer where that leaves less than the wanted blocks, but a batch at least.
template <class Plan>
void share_images(Plan& plan, int vector, int most_threads, int batch, int most_steps, int64_t wanted_blocks) {
  // A warp reads up to 512 neighbouring bytes; lanes beyond the channels idle.
  const int64_t across = ceil_div(plan.channels, vector);
  plan.lanes = power_of_two_from(std::min<int64_t>(across, 32));
  plan.slabs = int(ceil_div(across, plan.lanes));
  plan.units = plan.rows / plan.channels * plan.slabs;
  const int64_t pixels = most_threads / plan.lanes;  // of all threads
  int64_t steps = most_steps;
  while (steps > batch && plan.units * ceil_div(plan.plane, steps * pixels) < wanted_blocks) steps /= 2;
  const int64_t chunks = ceil_div(plan.plane, steps * pixels);
  plan.chunk = ceil_div(plan.plane, chunks);
  plan.chunks = int(ceil_div(plan.plane, plan.chunk));
  // Fewer threads for small maps, but whole warps.
  const int64_t rows = std::min<int64_t>(power_of_two_from(ceil_div(plan.chunk, batch)), pixels);
  plan.launch.threads = unsigned(std::max<int64_t>(rows * plan.lanes, 32));
  set_grid(plan.launch, plan.units, plan.chunks);
}

}  // namespace cotnet
