// Loops of local_aggregation and its gradients. Included once per target namespace by foreach_target.h.
// A task is one band of rows of one unit (NCHW) or of one image (NHWC); tasks write disjoint memory.
#include "cpu/stage.h"
#include "cpu/weights.h"
#include "cpu/weight_fields.h"
#include "cpu/window_nchw.h"
#include "cpu/direct_nchw.h"
#include "cpu/aggregation_nchw.h"
#include "cpu/window_nhwc.h"
#include "cpu/aggregation_nhwc.h"
#include "cpu/drivers.h"

template <class scalar_t, class Parallel>
void local_aggregation_forward(const AggregationProblem& p, const scalar_t* x, const scalar_t* w, scalar_t* y,
                               const Parallel& parallel) {
  for_tiles(p, PlainField<scalar_t>{w}, parallel, [&](auto& tiles, auto... place) { tiles.forward(place..., x, y); });
}

// Either gradient may be null. Both come out of one sweep: a band's inputs are read from memory once and are in cache
// for the second gradient.
template <class scalar_t, class Parallel>
void local_aggregation_backward(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* w,
                                scalar_t* grad_x, scalar_t* grad_w, const Parallel& parallel) {
  const PlainField<scalar_t> field{w};
  if (p.channels_last)
    return for_bands(p, field, parallel, parallel.threads(), [&](auto& tiles, int64_t n, int64_t band) {
      tiles.backward(n, band, x, grad_y, grad_x, grad_w, KeepGrads());
    });
  for_units(p, field, parallel, [&](auto& tiles, int64_t n, int64_t m, int64_t band) {
    if (grad_w) tiles.grad_weight(n, m, band, x, grad_y, plain_sinks(p, n, m, grad_w));
    if (grad_x) tiles.grad_input(n, m, band, grad_y, grad_x);
  });
}
