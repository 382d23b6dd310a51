// Operands of the calls that take more than a few pointers.
#pragma once

#include "core/types.h"

namespace cotnet {

// Null where there is none.
template <class scalar_t>
struct GroupNormOperands {
  const scalar_t* x;       // [N, C, H, W]
  const scalar_t* w;       // [N, G, Cw, K, Ho, Wo]
  const scalar_t* gamma;   // [G*Cw*K]
  const scalar_t* beta;    // [G*Cw*K]
  acc_t<scalar_t>* mean;   // [N, G*Cw]
  acc_t<scalar_t>* rstd;   // [N, G*Cw]
};

}  // namespace cotnet
