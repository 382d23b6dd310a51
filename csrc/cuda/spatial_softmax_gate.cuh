// spatial_softmax_gate and its gradients: with p = softmax over the map of x,
//     y = s + p*v        grad_v = p*grad_y        grad_x = p*(grad_y*v - sum of p*grad_y*v)
//
// Bytes, in maps: forward reads x, v, s and writes y, 4; backward reads x, v, grad_y and writes grad_x, grad_v, 5. Short
// rows (tile kernel) and what shared memory holds (whole kernel) move no more. Beyond that the second sweep reads again:
// forward 5, backward 8. spatial_softmax_gate_launch.h chooses.
//
// The order of every sum depends on sizes alone: lanes of a team or block in a fixed tree, chunks by number.
#pragma once

#include "cuda/spatial_softmax_gate_sweep.cuh"
#include "cuda/spatial_softmax_gate_tile.cuh"

namespace cotnet {

template <class Vectors, int kThreads, bool kBackward, class scalar_t>
void launch_gate_sweeps(const GatePlan& plan, const GateMaps<scalar_t>& maps, SoftmaxSums<acc_t<scalar_t>>* partial,
                        Stream stream) {
  if (plan.path == GatePath::kWhole) {
    const auto kernel = spatial_softmax_gate_whole_kernel<Vectors, kThreads, kBackward, scalar_t>;
    launch_kernel(kernel, plan.launch, stream, maps, plan);
    return;
  }
  const auto first = spatial_softmax_gate_gather_kernel<Vectors, kBackward, scalar_t>;
  const auto second = spatial_softmax_gate_finish_kernel<Vectors, kBackward, scalar_t>;
  launch_kernel(first, plan.launch, stream, maps, partial, plan);
  launch_kernel(second, plan.launch, stream, maps, partial, plan);
}

// `partial` has plan.partial_sums() numbers.
template <bool kBackward, class scalar_t>
void launch_gate(const GatePlan& plan, const GateMaps<scalar_t>& maps, acc_t<scalar_t>* partial, Stream stream) {
  auto* const sums = reinterpret_cast<SoftmaxSums<acc_t<scalar_t>>*>(partial);
  if (plan.path == GatePath::kTile)
    launch_kernel(spatial_softmax_gate_tile_kernel<scalar_t, kBackward>, plan.launch, stream, maps, plan);
  else if (plan.channels_last)
    launch_gate_sweeps<ImageVectors<scalar_t>, kBackward ? kGateImageBackwardThreads : kGateImageThreads, kBackward>(
        plan, maps, sums, stream);
  else
    launch_gate_sweeps<PlaneVectors<scalar_t>, kGateRowThreads, kBackward>(plan, maps, sums, stream);
}

template <class scalar_t>
void spatial_softmax_gate_forward_launch(const GatePlan& plan, const scalar_t* x, const scalar_t* v, const scalar_t* s,
                                         scalar_t* y, acc_t<scalar_t>* partial, Stream stream) {
  launch_gate<false>(plan, GateMaps<scalar_t>{x, v, s, y, nullptr}, partial, stream);
}

// Either gradient may be null. grad_v alone, p*grad_y, is a forward pass with grad_y in place of v and no s: `plan` must be
// of the forward pass then.
template <class scalar_t>
void spatial_softmax_gate_backward_launch(const GatePlan& plan, const scalar_t* grad_y, const scalar_t* x, const scalar_t* v,
                                          scalar_t* grad_x, scalar_t* grad_v, acc_t<scalar_t>* partial, Stream stream) {
  if (grad_x)
    launch_gate<true>(plan, GateMaps<scalar_t>{x, v, grad_y, grad_x, grad_v}, partial, stream);
  else if (grad_v)
    launch_gate<false>(plan, GateMaps<scalar_t>{x, grad_y, nullptr, grad_v, nullptr}, partial, stream);
}

}  // namespace cotnet
