// local_aggregation and its gradients on CUDA, on raw pointers.
#pragma once

#include "cuda/aggregation.cuh"

namespace cotnet {

template <class scalar_t>
void local_aggregation_forward(const AggregationProblem& p, const scalar_t* x /* [N, C, H, W] */,
                               const scalar_t* w /* [N, G, Cw, K, Ho, Wo] */, scalar_t* y /* [N, G*C, Ho, Wo] */,
                               const DeviceNumbers&, Stream stream) {
  launch_aggregation_forward(p, PlainWeights<scalar_t>{w, weight_strides(p)}, x, y, stream);
}

// Either gradient may be null.
template <class scalar_t>
void local_aggregation_backward(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* w,
                                scalar_t* grad_x, scalar_t* grad_w, const DeviceNumbers&, Stream stream) {
  const WeightStrides strides = weight_strides(p);
  if (grad_x) launch_aggregation_grad_input(p, PlainWeights<scalar_t>{w, strides}, grad_y, grad_x, stream);
  if (grad_w) launch_aggregation_grad_weight(p, PlainSink<scalar_t>{grad_w, strides}, grad_y, x, stream);
}

}  // namespace cotnet
