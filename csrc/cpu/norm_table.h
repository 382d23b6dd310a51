// Norms as tables of numbers of channels, and how the sums of a backward become one. Included once per target namespace.
#include "cpu/map_sweep.h"

template <class acc>
struct NormOf {
  const acc* table;   // [3, C]: m, a, b
  const acc* factor;  // [C]: f
  bool batch;         // whether m and f are the batch's own
};

// Column c of the table [5, C] for the backward: m, a, b, c, d, from the sums of grad_z and grad_z*(x - m) over the batch. They
// are also the gradients of bias and, times f, weight.
template <class acc>
void norm_backward_row(const MapProblem& p, const NormOf<acc>& norm, int64_t c, double grad_z, double with_x, acc* table,
                       acc* grad_weight, acc* grad_bias) {
  const double factor = double(norm.factor[c]), share = norm.batch ? 1 / double(p.batch * p.plane) : 0;
  for (int row = 0; row < 3; ++row) table[row * p.channels + c] = norm.table[row * p.channels + c];
  // Given statistics: zero, also where a sum is infinite or no number, so that images stay apart.
  table[3 * p.channels + c] = norm.batch ? acc(grad_z * share) : acc(0);
  table[4 * p.channels + c] = norm.batch ? acc(with_x * factor * factor * share) : acc(0);
  grad_weight[c] = acc(with_x * factor);
  grad_bias[c] = acc(grad_z);
}
