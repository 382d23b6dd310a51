// Loops of softmax_aggregation: the aggregation with weights softmaxed over their taps. Included once per target
// namespace by foreach_target.h. The probabilities live in registers in the forward pass, and in one tile's scratch
// where the gradient of the input needs those of neighbouring positions.
#include "cpu/stage.h"
#include "cpu/weights.h"
#include "cpu/weight_fields.h"
#include "cpu/window_nchw.h"
#include "cpu/direct_nchw.h"
#include "cpu/aggregation_nchw.h"
#include "cpu/window_nhwc.h"
#include "cpu/aggregation_nhwc.h"
#include "cpu/drivers.h"

// Turns the gradient d of the probabilities into that of the logits, p_t * (d_t - sum over s of p_s * d_s), and writes it.
template <class scalar_t>
struct SoftmaxSink {
  SoftmaxWeights<scalar_t> weights;
  PlainSink<scalar_t> out;
  Vec<acc_t<scalar_t>>* chances;  // [K]

  COTNET_INLINE void operator()(int64_t position, Vec<acc_t<scalar_t>>* grads, int64_t count, int64_t fresh) {
    weights.template block<0>(chances, position, count);
    Vec<acc_t<scalar_t>> mean = {};
    for (int64_t t = 0; t < out.taps; ++t) mean += chances[t] * grads[t];
    for (int64_t t = 0; t < out.taps; ++t) grads[t] = chances[t] * (grads[t] - mean);
    out(position, grads, count, fresh);
  }
};

template <class scalar_t, class Parallel>
void softmax_aggregation_forward(const AggregationProblem& p, const scalar_t* x, const scalar_t* logits, scalar_t* y,
                                 const Parallel& parallel) {
  const SoftmaxField<scalar_t> field{{logits}};
  for_tiles(p, field, parallel, [&](auto& tiles, auto... place) { tiles.forward(place..., x, y); });
}

// Either gradient may be null.
template <class scalar_t, class Parallel>
void softmax_aggregation_backward(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x,
                                  const scalar_t* logits, scalar_t* grad_x, scalar_t* grad_logits, const Parallel& parallel) {
  const SoftmaxField<scalar_t> field{{logits}};
  if (p.channels_last)
    return for_bands(p, field, parallel, parallel.threads(), [&](auto& tiles, int64_t n, int64_t band) {
      tiles.backward(n, band, x, grad_y, grad_x, grad_logits, SoftmaxGrads());
    });
  for_units(p, field, parallel, [&](auto& tiles, int64_t n, int64_t m, int64_t band) {
    if (grad_logits) {
      const auto outs = plain_sinks(p, n, m, grad_logits);
      tiles.grad_weight(n, m, band, x, grad_y, [&](int64_t g) {
        return SoftmaxSink<scalar_t>{tiles.view(n, g, m), outs(g), tiles.tap_buffer()};
      });
    }
    if (grad_x) tiles.grad_input(n, m, band, grad_y, grad_x);
  });
}
