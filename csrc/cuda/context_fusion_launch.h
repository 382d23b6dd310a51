// How context_fusion is launched, and why.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "cuda/map_launch.h"

namespace cotnet {

struct FusionPlan {
  Launch launch;
  int64_t rows;  // N*C planes
  int64_t channels;
  int64_t plane;
  bool channels_last;
  bool aligned;  // vectors may be moved whole

  // NCHW: a block has several planes, or a chunk of one.
  int rows_per_block;
  int team;           // backward: lanes that sum one plane together, a power of two
  int teams_per_row;

  // channels_last: a block has a slab of channels at a chunk of pixels.
  int lanes;  // vectors of channels, a power of two
  int slabs;

  int64_t units;  // of work along x: groups of planes, planes, or images times slabs
  int chunks;     // blocks along a plane
  int64_t chunk;  // pixels of each, the last may have fewer

  // Backward: elements of acc_t for the sums over chunks, when there are several.
  int64_t partial_sums() const { return chunks > 1 ? rows * chunks : 0; }
};

// NCHW: vectors of each map that a thread has in registers at once. Forward: 4 of 2 maps, 128 bytes under way for each
// thread; backward: 2 of 3, 96 bytes. With 80 registers 768 threads share a multiprocessor: 72 KB or more, and 48 KB keep
// the memory of an H200 busy.
constexpr int kFusionForwardItems = 4;
constexpr int kFusionBackwardItems = 2;
constexpr int kFusionThreads = 256;
constexpr int kFusionBatch = 4;  // channels_last: pixels of a thread whose loads go out together

namespace fusion {

inline void choose_planes(FusionPlan& plan, int element_bytes, bool backward) {
  const int vector = 16 / element_bytes, acc_bytes = std::max(element_bytes, 4);
  const int items = backward ? kFusionBackwardItems : kFusionForwardItems;
  const int64_t vectors = kFusionThreads * items, room = (vectors - 1) * vector;  // a range may begin within a vector
  if (plan.plane <= room) {
    // Every plane has a team of threads of its own.
    int64_t rows = std::clamp<int64_t>(room / plan.plane, 1, kFusionThreads);
    // Blocks that begin at a vector have no vector in part but the last.
    const int64_t step = vector / std::min<int64_t>(plan.plane & -plan.plane, vector);
    if (rows > step) rows = rows / step * step;
    plan.rows_per_block = int(std::min(rows, plan.rows));
    plan.chunk = plan.plane;
  } else {
    // Pieces of one size: what is left over for the last one would keep a block half busy.
    const int64_t line = 8 * vector;  // 128 bytes
    const int64_t chunks = ceil_div(plan.plane, room / line * line);
    plan.rows_per_block = 1;
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
  const int products = backward ? threads * items * vector : 0;
  plan.launch.shared_bytes = unsigned(acc_bytes * (products + threads + 2 * (rows + vector)));
}

inline void choose_images(FusionPlan& plan, int element_bytes, const DeviceNumbers& device) {
  const int vector = 16 / element_bytes, acc_bytes = std::max(element_bytes, 4);
  // A warp reads up to 512 neighbouring bytes; lanes beyond the channels idle.
  const int64_t across = ceil_div(plan.channels, vector);
  plan.lanes = power_of_two_from(std::min<int64_t>(across, 32));
  plan.slabs = int(ceil_div(across, plan.lanes));
  plan.units = plan.rows / plan.channels * plan.slabs;
  // Sixteen pixels for a thread, so that the weights of its channels and the merging of sums cost little beside them; but
  // four where that leaves fewer than eight blocks for a multiprocessor.
  const int64_t pixels = kFusionThreads / plan.lanes;  // of all threads
  int64_t steps = 4 * kFusionBatch;
  while (steps > kFusionBatch && plan.units * ceil_div(plan.plane, steps * pixels) < 8 * device.sm_count) steps /= 2;
  const int64_t chunks = ceil_div(plan.plane, steps * pixels);
  plan.chunk = ceil_div(plan.plane, chunks);
  plan.chunks = int(ceil_div(plan.plane, plan.chunk));
  // Fewer threads for small maps, but whole warps.
  const int64_t rows = std::min<int64_t>(power_of_two_from(ceil_div(plan.chunk, kFusionBatch)), pixels);
  plan.launch.threads = unsigned(std::max<int64_t>(rows * plan.lanes, 32));
  set_grid(plan.launch, plan.units, plan.chunks);
  const int width = plan.lanes * vector, warps = int(plan.launch.threads) / 32;
  plan.launch.shared_bytes = unsigned(acc_bytes * width * (2 + warps));
}

inline FusionPlan choose(const MapProblem& p, int element_bytes, bool aligned, bool backward, const DeviceNumbers& device) {
  FusionPlan plan{};
  plan.rows = p.batch * p.channels;
  plan.channels = p.channels;
  plan.plane = p.plane;
  plan.channels_last = p.channels_last;
  plan.aligned = aligned && (!p.channels_last || p.channels % (16 / element_bytes) == 0);
  plan.rows_per_block = plan.team = plan.teams_per_row = plan.lanes = plan.slabs = plan.chunks = 1;
  if (plan.rows == 0 || plan.plane == 0)
    plan.launch.grid_x = unsigned(plan.chunks = 0);
  else if (p.channels_last)
    choose_images(plan, element_bytes, device);
  else
    choose_planes(plan, element_bytes, backward);
  return plan;
}

}  // namespace fusion

// `aligned`: every map begins at a multiple of 16 bytes.
inline FusionPlan choose_context_fusion_forward(const MapProblem& p, int element_bytes, bool aligned,
                                                const DeviceNumbers& device) {
  return fusion::choose(p, element_bytes, aligned, false, device);
}
inline FusionPlan choose_context_fusion_backward(const MapProblem& p, int element_bytes, bool aligned,
                                                 const DeviceNumbers& device) {
  return fusion::choose(p, element_bytes, aligned, true, device);
}

// One warp for each plane: adds the sums of its chunks.
inline Launch choose_context_fusion_grad_logits(const FusionPlan& plan) {
  Launch launch;
  launch.threads = 128;
  set_grid(launch, ceil_div(plan.rows, 4), 1);
  return launch;
}

}  // namespace cotnet
