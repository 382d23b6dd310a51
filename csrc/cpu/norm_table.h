// A norm of vectors and the table of its backward. Included once per target namespace.
#include "cpu/map_sweep.h"

template <class V>
COTNET_INLINE V normed(V x, const V* norm) {
  return (x - norm[0]) * norm[1] + norm[2];
}
// max(z, 0); NaN stays NaN.
template <class V>
COTNET_INLINE V rectified(V z) {
  return z < 0 ? V{} : z;
}

// Column c of the table [5, C]: m, a, b, c, d, from the sums of grad_z and grad_z*(x - m) over the batch; with the gradients of
// weight and bias.
template <class acc>
void norm_backward_row(const MapProblem& p, const NormOf<acc>& norm, int64_t c, double grad_z, double with_x, acc* table,
                       acc* grad_weight, acc* grad_bias) {
  const NormColumn<acc> column(grad_z, with_x, double(norm.factor[c]), norm.share(p));
  for (int row = 0; row < 3; ++row) table[row * p.channels + c] = norm.table[row * p.channels + c];
  table[3 * p.channels + c] = column.c;
  table[4 * p.channels + c] = column.d;
  grad_weight[c] = column.grad_weight;
  grad_bias[c] = column.grad_bias;
}
