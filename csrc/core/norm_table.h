// Norms as tables of numbers of channels, and how the sums of a backward become one:
//     grad_x = a*(grad_z - c - (x - m)*d)
#pragma once

#include "core/host_device.h"
#include "core/problem.h"

namespace cotnet {

template <class acc>
struct NormOf {
  const acc* table;   // [3, C]: m, a, b
  const acc* factor;  // [C]: f
  bool batch;         // whether m and f are the batch's own

  // 1 divided by the elements of a channel, or 0 for given statistics.
  double share(const MapProblem& p) const { return batch ? 1 / double(p.batch * p.plane) : 0; }
};

// What the sums of grad_z and grad_z*(x - m) over the batch make of a channel.
template <class acc>
struct NormColumn {
  acc c, d;
  acc grad_weight, grad_bias;

  // Given statistics: c and d are zero, also where a sum is infinite or no number, so that images stay apart.
  COTNET_HD NormColumn(double grad_z, double with_x, double factor, double share)
      : c(share > 0 ? acc(grad_z * share) : acc(0)),
        d(share > 0 ? acc(with_x * factor * factor * share) : acc(0)),
        grad_weight(acc(with_x * factor)),
        grad_bias(acc(grad_z)) {}
};

}  // namespace cotnet
