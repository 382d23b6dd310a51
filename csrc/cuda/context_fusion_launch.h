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
  share_planes(plan, vector, kFusionThreads, items);
  const int threads = int(plan.launch.threads), products = backward ? threads * items * vector : 0;
  plan.launch.shared_bytes = unsigned(acc_bytes * (products + threads + 2 * (plan.rows_per_block + vector)));
}

inline void choose_images(FusionPlan& plan, int element_bytes, const DeviceNumbers& device) {
  const int vector = 16 / element_bytes, acc_bytes = std::max(element_bytes, 4);
  // Sixteen pixels for a thread, so that the weights of its channels and the merging of sums cost little beside them; but
  // four where that leaves fewer than eight blocks for a multiprocessor.
  share_images(plan, vector, kFusionThreads, kFusionBatch, 4 * kFusionBatch, 8 * int64_t(device.sm_count));
  const int width = plan.lanes * vector, warps = int(plan.launch.threads) / 32;
  plan.launch.shared_bytes = unsigned(acc_bytes * width * (2 + warps));
}

inline FusionPlan choose(const MapProblem& p, int element_bytes, bool aligned, bool backward, const DeviceNumbers& device) {
  auto plan = plan_maps<FusionPlan>(p, element_bytes, aligned);
  if (plan.launch.empty()) return plan;
  if (p.channels_last)
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
