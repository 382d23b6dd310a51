// What the kernels of spatial_softmax_gate share: sums of a softmax, and the results of one vector.
#pragma once

#include <limits>

#include "cuda/map_vectors.cuh"
#include "cuda/spatial_softmax_gate_launch.h"

namespace cotnet {

// Forward: t is s, or null for zeros, and out is y. Backward: t is grad_y, out is grad_x.
template <class scalar_t>
struct GateMaps {
  const scalar_t* x;
  const scalar_t* v;
  const scalar_t* t;
  scalar_t* out;
  scalar_t* grad_v;  // or null

  // The same from element `at` on.
  COTNET_DEVICE GateMaps from(int64_t at) const {
    return {x + at, v + at, t ? t + at : nullptr, out + at, grad_v ? grad_v + at : nullptr};
  }
};

template <class acc>
constexpr acc kLowest = std::numeric_limits<acc>::lowest();

// The softmax of one row: maximum, sum of exp(x - top), sum of exp(x - top)*grad_y*v. Once `normalise`d, 1/sum in place of
// sum and the sum of p*grad_y*v in place of dot. Starting at the lowest number, not at -inf, keeps x - top defined where all
// of x is -inf; then 1/sum is infinite and the row NaN.
template <class acc>
struct SoftmaxSums {
  acc top, sum, dot;

  static COTNET_DEVICE SoftmaxSums none() {
    return {kLowest<acc>, acc(0), acc(0)};
  }
  COTNET_DEVICE void raise(acc new_top) {
    const acc shrink = fast_exponential(top - new_top);
    top = new_top;
    sum *= shrink;
    dot *= shrink;
  }
  COTNET_DEVICE void merge(SoftmaxSums other) {
    const acc most = maximum(top, other.top);
    raise(most);
    other.raise(most);
    sum += other.sum;
    dot += other.dot;
  }
  COTNET_DEVICE SoftmaxSums normalised() const {
    const acc scale = acc(1) / sum;
    return {top, scale, dot * scale};
  }
};

// `count` sums that lie `stride` apart, in order.
template <class acc>
COTNET_DEVICE SoftmaxSums<acc> merge_list(const SoftmaxSums<acc>* list, int count, int stride) {
  SoftmaxSums<acc> total = SoftmaxSums<acc>::none();
  for (int i = 0; i < count; ++i) total.top = maximum(total.top, list[i * stride].top);
  for (int i = 0; i < count; ++i) {
    const SoftmaxSums<acc> next = list[i * stride];
    const acc shrink = fast_exponential(next.top - total.top);
    total.sum = fma(next.sum, shrink, total.sum);
    total.dot = fma(next.dot, shrink, total.dot);
  }
  return total;
}

// Merges the sums of the threads that share a row, and normalises: lanes of a warp first, then the warps in order.
// `memory` [warps + 1, lanes, kSums].
template <int kSums, class acc>
COTNET_DEVICE void merge_block(SoftmaxSums<acc>* sums, int lanes, SoftmaxSums<acc>* memory, bool normalise) {
  const int thread = int(threadIdx.x), lane = thread & (lanes - 1), warp = thread / 32, warps = int(blockDim.x) / 32;
  const int width = lanes * kSums;
  for (int d = lanes; d < 32; d *= 2)
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i) {
      const SoftmaxSums<acc> own = sums[i];
      sums[i].merge({shuffle_xor(kAllLanes, own.top, d), shuffle_xor(kAllLanes, own.sum, d),
                     shuffle_xor(kAllLanes, own.dot, d)});
    }
  if (thread % 32 < lanes)
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i) memory[warp * width + lane * kSums + i] = sums[i];
  sync_block();
  SoftmaxSums<acc>* const total = memory + warps * width;
  for (int i = thread; i < width; i += int(blockDim.x)) {
    const SoftmaxSums<acc> merged = merge_list(memory + i, warps, width);
    total[i] = normalise ? merged.normalised() : merged;
  }
  sync_block();
  COTNET_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = total[lane * kSums + i];
}

// The three maps of one vector of a thread.
template <class scalar_t>
struct GateVectors {
  MapPack<scalar_t> x, v, t;
};

// Results of element i, from exp's argument on.
template <bool kBackward, class scalar_t>
COTNET_DEVICE void gate_element(GateVectors<scalar_t>& in, int i, const SoftmaxSums<acc_t<scalar_t>>& row, bool wants_v) {
  using acc = acc_t<scalar_t>;
  const acc p = fast_exponential(widen(in.x.at[i]) - row.top) * row.sum;
  const acc v = widen(in.v.at[i]), t = widen(in.t.at[i]);
  if constexpr (kBackward) {
    in.x.at[i] = narrow<scalar_t>(p * (t * v - row.dot));
    if (wants_v) in.v.at[i] = narrow<scalar_t>(p * t);
  } else {
    in.x.at[i] = narrow<scalar_t>(fma(p, v, t));
  }
}

// Loads v and t of a batch of slots; a null t stays zero.
template <int kCount, class Slot, class scalar_t>
COTNET_DEVICE void load_v_and_t(const GateMaps<scalar_t>& maps, const Slot* slots, GateVectors<scalar_t>* in) {
  COTNET_UNROLL
  for (int b = 0; b < kCount; ++b) {
    in[b].v = load_slot(maps.v, slots[b]);
    in[b].t = load_vec_if<kMapVector<scalar_t>>(maps.t ? maps.t + slots[b].at : maps.v, maps.t && slots[b].whole());
  }
}
template <int kCount, class Slot, class scalar_t>
COTNET_DEVICE void mend_v_and_t(const GateMaps<scalar_t>& maps, const Slot* slots, GateVectors<scalar_t>* in) {
  const scalar_t zero = narrow<scalar_t>(acc_t<scalar_t>(0));
  COTNET_UNROLL
  for (int b = 0; b < kCount; ++b) {
    mend_slot(in[b].v, maps.v, slots[b], zero);
    if (maps.t) mend_slot(in[b].t, maps.t, slots[b], zero);
  }
}
template <bool kBackward, class Slot, class scalar_t>
COTNET_DEVICE void store_results(const GateMaps<scalar_t>& maps, const Slot& slot, const GateVectors<scalar_t>& results) {
  store_slot(maps.out, slot, results.x);
  if (kBackward && maps.grad_v) store_slot(maps.grad_v, slot, results.v);
}

}  // namespace cotnet
