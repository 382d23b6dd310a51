// What the choosers of spatial_softmax_gate, context_fusion and sweeps share.
#pragma once

#include "core/window.h"
#include "cuda/launch.h"

namespace cotnet {

inline int power_of_two_upto(int64_t n) {
  int p = 1;
  while (2 * int64_t(p) <= n) p *= 2;
  return p;
}
inline int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The x axis counts the pieces of a map, the others the units of work: together they count further than 32 bits do.
inline void set_grid(Launch& launch, int64_t units, int64_t pieces) {
  launch.grid_x = unsigned(pieces);
  launch.grid_z = unsigned(ceil_div(units, 65535));
  launch.grid_y = launch.grid_z == 0 ? 0 : unsigned(ceil_div(units, launch.grid_z));
}

}  // namespace cotnet
