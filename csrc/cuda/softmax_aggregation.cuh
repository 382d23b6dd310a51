// softmax_aggregation and its backward on CUDA, on raw pointers. Probabilities live in registers only.
#pragma once

#include "cuda/aggregation.cuh"
#include "cuda/aggregation_direct.cuh"
#include "cuda/aggregation_image_backward.cuh"
#include "cuda/aggregation_pixels.cuh"
#include "cuda/aggregation_tile_backward.cuh"

namespace cotnet {

template <class scalar_t>
void softmax_aggregation_forward(const AggregationProblem& p, const scalar_t* x /* [N, C, H, W] */,
                                 const scalar_t* logits /* [N, G, Cw, K, Ho, Wo] */, scalar_t* y /* [N, G*C, Ho, Wo] */,
                                 const DeviceNumbers& numbers, Stream stream) {
  const SoftmaxWeights<scalar_t> weights{{logits, weight_strides(p)}};
  if (try_aggregation_direct(p, weights, logits, x, y, stream)) return;
  if (try_aggregation_image(p, weights, logits, x, y, numbers, stream)) return;
  if (try_aggregation_tile<false>(p, weights, logits, x, y, numbers, stream)) return;
  if (try_aggregation_pixels<false>(p, weights, logits, x, y, stream)) return;
  launch_aggregation_forward(p, weights, x, y, stream);
}

// Elements of acc_t that the backward needs for the largest logit and 1/(sum of exponentials) of each window: 2/K of the
// logits. Without them every window's softmax would be taken K times.
inline int64_t softmax_scratch(const AggregationProblem& p) { return 2 * p.batch * p.heads * p.weight_channels * p.out_plane(); }

// A thread owns one window.
template <class scalar_t>
COTNET_KERNEL(kAnyThreads, 1)
softmax_normaliser_kernel(const AggregationProblem p, const SoftmaxWeights<scalar_t> weights,
                          acc_t<scalar_t>* normalisers /* [N, G, Cw, Ho, Wo, 2] */) {
  Task task;
  if (!task_of_thread(p, p.heads, 1, p.out_plane(), task)) return;
  const WeightPlace at{task.image, task.head * p.weight_channels + task.weight_channel, p.heads * p.weight_channels,
                       task.position, p.out_plane(), p.taps()};
  const auto window = weights.open(at);
  store_vec(normalisers + 2 * (at.unit() * at.plane + at.position), Pack<acc_t<scalar_t>, 2>{{window.top, window.scale}});
}

// Turns the gradient d of the probabilities into that of the logits: p_t * (d_t - sum over s of p_s * d_s). d is computed
// twice rather than kept: a window may have any number of taps.
template <class scalar_t>
struct SoftmaxSink {
  using acc = acc_t<scalar_t>;
  KnownSoftmaxWeights<scalar_t> weights;
  PlainSink<scalar_t> out;

  COTNET_DEVICE void write(const AggregationProblem& p, const WeightPlace& at, const WindowGradient<scalar_t>& gradient) const {
    const auto window = weights.open(at);
    acc mean = 0;
    for (int64_t u = 0, t = 0; u < p.rows.kernel; ++u)
      for (int64_t v = 0; v < p.cols.kernel; ++v, ++t) mean = fma(window(t), gradient(u, v), mean);
    scalar_t* const to = out.grad_w + at.offset(out.strides);
    for (int64_t u = 0, t = 0; u < p.rows.kernel; ++u)
      for (int64_t v = 0; v < p.cols.kernel; ++v, ++t) store_narrow(to + t * out.strides.tap, window(t) * (gradient(u, v) - mean));
  }
};

// Either gradient may be null. scratch: softmax_scratch(p) elements.
template <class scalar_t>
void softmax_aggregation_backward(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* logits,
                                  scalar_t* grad_x, scalar_t* grad_logits, acc_t<scalar_t>* scratch, const DeviceNumbers& numbers,
                                  Stream stream) {
  const SoftmaxBackward<scalar_t> both;
  if (grad_x && grad_logits && try_aggregation_tile_backward(p, both, logits, grad_y, x, grad_x, grad_logits, numbers, stream))
    return;
  const PlainWeights<scalar_t> plain{logits, weight_strides(p)};
  const SoftmaxWeights<scalar_t> weights{plain};
  if (try_aggregation_image_backward(p, weights, grad_y, x, logits, grad_x, grad_logits, numbers, stream)) return;
  const KnownSoftmaxWeights<scalar_t> known{plain, scratch};
  const SoftmaxTileSink<scalar_t> sink{{plain}};
  const bool done = grad_logits && try_aggregation_tile_grad_weight(p, sink, logits, grad_y, x, grad_logits, numbers, stream);
  if (!grad_x && (!grad_logits || done)) return;
  launch_kernel(softmax_normaliser_kernel<scalar_t>, cover(softmax_scratch(p) / 2), stream, p, SoftmaxWeights<scalar_t>{plain},
                scratch);
  if (grad_x && !try_aggregation_tile<true>(p, known, logits, grad_y, grad_x, numbers, stream) &&
      !try_aggregation_pixels<true>(p, known, logits, grad_y, grad_x, stream))
    launch_aggregation_grad_input(p, known, grad_y, grad_x, stream);
  if (grad_logits && !done)
    launch_aggregation_grad_weight(p, SoftmaxSink<scalar_t>{known, {grad_logits, plain.strides}}, grad_y, x, stream);
}

}  // namespace cotnet
