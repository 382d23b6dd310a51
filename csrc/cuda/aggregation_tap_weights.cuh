// Weights of one tap at a time, at neighbouring columns: from raw to what is summed. For kernels that have no registers for
// the weights of all taps. Taps come in any order, each once.
#pragma once

#include "cuda/weights.cuh"

namespace cotnet {

// read(t, w): the raw weights of tap t. transform(t, w) makes of them what is summed with, finish(sums) does what is left.
template <class Weights, int kColumns>
struct TapWeights;

template <class scalar_t, int kColumns>
struct TapWeights<PlainWeights<scalar_t>, kColumns> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kReadsTwice = false;
  template <class Read>
  COTNET_DEVICE TapWeights(const PlainWeights<scalar_t>&, const WeightPlace&, const Read&) {}
  COTNET_DEVICE void transform(int, acc (&)[kColumns]) {}
  COTNET_DEVICE void finish(acc (&)[kColumns]) const {}
};

// The largest logit comes first, from a reading of its own; sums are divided by the sum of exponentials in the end.
template <class scalar_t, int kColumns>
struct TapWeights<SoftmaxWeights<scalar_t>, kColumns> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kReadsTwice = true;
  acc top[kColumns], total[kColumns] = {};

  template <class Read>
  COTNET_DEVICE TapWeights(const SoftmaxWeights<scalar_t>&, const WeightPlace& at, const Read& read) {
    read(0, top);
    COTNET_UNROLL_BY(8)
    for (int t = 1; t < int(at.taps); ++t) {
      acc logits[kColumns];
      read(t, logits);
      COTNET_UNROLL
      for (int i = 0; i < kColumns; ++i) top[i] = logits[i] > top[i] ? logits[i] : top[i];
    }
  }
  COTNET_DEVICE void transform(int, acc (&w)[kColumns]) {
    COTNET_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      // Results of 16 bits are rounded far more coarsely than the fast exponential is.
      w[i] = sizeof(scalar_t) == 2 ? fast_exponential(w[i] - top[i]) : exponential(w[i] - top[i]);
      total[i] += w[i];
    }
  }
  COTNET_DEVICE void finish(acc (&sums)[kColumns]) const {
    COTNET_UNROLL
    for (int i = 0; i < kColumns; ++i) sums[i] *= 1 / total[i];
  }
};

template <class scalar_t, int kColumns>
struct TapWeights<NormWeights<scalar_t>, kColumns> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kReadsTwice = false;
  typename NormWeights<scalar_t>::Window window;

  template <class Read>
  COTNET_DEVICE TapWeights(const NormWeights<scalar_t>& weights, const WeightPlace& at, const Read&)
      : window(weights.open(at)) {}
  COTNET_DEVICE void transform(int t, acc (&w)[kColumns]) {
    const acc scale = window.rstd * window.scale(t), shift = window.beta ? load_wide(window.beta + t) : acc(0);
    COTNET_UNROLL
    for (int i = 0; i < kColumns; ++i) w[i] = fma(w[i] - window.mean, scale, shift);
  }
  COTNET_DEVICE void finish(acc (&)[kColumns]) const {}
};

}  // namespace cotnet
