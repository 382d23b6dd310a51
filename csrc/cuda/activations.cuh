// SiLU and its parts.
#pragma once

#include "cuda/device.cuh"

namespace cotnet {

// 1/(1 + exp(-z)); the exponential is of a number that is not positive.
template <class acc>
COTNET_DEVICE acc sigmoid(acc z) {
  const acc e = fast_exponential(z < 0 ? z : -z), chance = fast_reciprocal(acc(1) + e);
  return z < 0 ? e * chance : chance;
}
template <class acc>
COTNET_DEVICE acc silu(acc z) {
  return z * sigmoid(z);
}

}  // namespace cotnet
