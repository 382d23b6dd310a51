// local_aggregation and its gradients on CUDA, on raw pointers.
#pragma once

#include "cuda/aggregation.cuh"
#include "cuda/aggregation_direct.cuh"
#include "cuda/aggregation_image_backward.cuh"
#include "cuda/aggregation_pixels.cuh"
#include "cuda/aggregation_tile_backward.cuh"

namespace cotnet {

template <class scalar_t>
void local_aggregation_forward(const AggregationProblem& p, const scalar_t* x /* [N, C, H, W] */,
                               const scalar_t* w /* [N, G, Cw, K, Ho, Wo] */, scalar_t* y /* [N, G*C, Ho, Wo] */,
                               const DeviceNumbers& numbers, Stream stream) {
  const PlainWeights<scalar_t> weights{w, weight_strides(p)};
  if (try_aggregation_direct(p, weights, w, x, y, stream)) return;
  if (try_aggregation_image(p, weights, w, x, y, numbers, stream)) return;
  if (try_aggregation_tile<false>(p, weights, w, x, y, numbers, stream)) return;
  if (try_aggregation_pixels<false>(p, weights, w, x, y, stream)) return;
  launch_aggregation_forward(p, weights, x, y, stream);
}

// Either gradient may be null.
template <class scalar_t>
void local_aggregation_backward(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* w,
                                scalar_t* grad_x, scalar_t* grad_w, const DeviceNumbers& numbers, Stream stream) {
  const WeightStrides strides = weight_strides(p);
  const PlainWeights<scalar_t> weights{w, strides};
  const PlainBackward<scalar_t> both;
  if (grad_x && grad_w && try_aggregation_tile_backward(p, both, w, grad_y, x, grad_x, grad_w, numbers, stream)) return;
  if (try_aggregation_image_backward(p, weights, grad_y, x, w, grad_x, grad_w, numbers, stream)) return;
  if (grad_x && !try_aggregation_tile<true>(p, weights, w, grad_y, grad_x, numbers, stream) &&
      !try_aggregation_pixels<true>(p, weights, w, grad_y, grad_x, stream))
    launch_aggregation_grad_input(p, weights, grad_y, grad_x, stream);
  const PlainTileSink<scalar_t> sink;
  if (grad_w && !try_aggregation_tile_grad_weight<scalar_t>(p, sink, nullptr, grad_y, x, grad_w, numbers, stream) &&
      !try_aggregation_pixels_grad_weight(p, grad_y, x, grad_w, stream))
    launch_aggregation_grad_weight(p, PlainSink<scalar_t>{grad_w, strides}, grad_y, x, stream);
}

}  // namespace cotnet
