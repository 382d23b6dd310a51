// What becomes of a sum of an aggregation before it is stored: nothing, or what follows the aggregation in a layer. A kernel
// asks for that of a channel of the output once for all sums that it has of it.
#pragma once

#include "cuda/activations.cuh"

namespace cotnet {

struct NoTail {
  COTNET_DEVICE NoTail of(int64_t) const { return {}; }
  template <class acc>
  COTNET_DEVICE acc operator()(acc sum) const {
    return sum;
  }
};

// silu(sum + shift)
template <class acc>
struct ShiftedSilu {
  const acc* shift;  // [G*C]

  struct OfChannel {
    acc shift;
    COTNET_DEVICE acc operator()(acc sum) const { return silu(sum + shift); }
  };
  COTNET_DEVICE OfChannel of(int64_t channel) const { return {load_wide(shift + channel)}; }
};

}  // namespace cotnet
