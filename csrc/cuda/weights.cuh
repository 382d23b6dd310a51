// Where the weights of a window come from: as they are, softmaxed over the taps, or group-normalised. A source opens the
// window of one weight channel at one position, whose weights are then asked for tap by tap: transformed weights never
// exist anywhere but in registers.
#pragma once

#include "cuda/device.cuh"

namespace cotnet {

// Elements between neighbours in [N, G, Cw, K, positions] of either layout.
struct WeightStrides {
  int64_t image, group, tap, position;  // group: from one of the G*Cw weight channels to the next
};

struct WeightPlace {
  int64_t image;     // n
  int64_t group;     // g*Cw + m, of `groups`
  int64_t groups;    // G*Cw
  int64_t position;  // i*Wo + j, of `plane`
  int64_t plane;     // Ho*Wo
  int64_t taps;      // K

  COTNET_DEVICE int64_t offset(const WeightStrides& s) const { return image * s.image + group * s.group + position * s.position; }
  COTNET_DEVICE int64_t unit() const { return image * groups + group; }
};

template <class scalar_t>
struct PlainWeights {
  const scalar_t* w;  // [N, G, Cw, K, Ho, Wo]
  WeightStrides strides;

  struct Window {
    const scalar_t* w;
    int64_t tap;
    COTNET_DEVICE acc_t<scalar_t> operator()(int64_t t) const { return load_wide(w + t * tap); }
  };
  COTNET_DEVICE Window open(const WeightPlace& at) const { return {w + at.offset(strides), strides.tap}; }
};

// exp(logit - top) * scale, with top the largest logit of the window.
template <class scalar_t>
struct SoftmaxWindow {
  using acc = acc_t<scalar_t>;
  typename PlainWeights<scalar_t>::Window logits;
  acc top, scale;
  COTNET_DEVICE acc operator()(int64_t t) const { return exponential(logits(t) - top) * scale; }
};

// Reads every window's logits twice; the second time they are in the cache.
template <class scalar_t>
struct SoftmaxWeights {
  using acc = acc_t<scalar_t>;
  PlainWeights<scalar_t> logits;

  COTNET_DEVICE SoftmaxWindow<scalar_t> open(const WeightPlace& at) const {
    const auto window = logits.open(at);
    acc top = window(0);
    for (int64_t t = 1; t < at.taps; ++t) {
      const acc logit = window(t);
      top = logit > top ? logit : top;
    }
    acc sum = 0;
    for (int64_t t = 0; t < at.taps; ++t) sum += exponential(window(t) - top);
    return {window, top, acc(1) / sum};
  }
};

// The same where a kernel before has left top and scale of each window, for the gradients, which open a window K times.
template <class scalar_t>
struct KnownSoftmaxWeights {
  using acc = acc_t<scalar_t>;
  PlainWeights<scalar_t> logits;
  const acc* normalisers;  // [N, G, Cw, Ho, Wo, 2]

  COTNET_DEVICE SoftmaxWindow<scalar_t> open(const WeightPlace& at) const {
    const Pack<acc, 2> known = load_vec<2>(normalisers + 2 * (at.unit() * at.plane + at.position));
    return {logits.open(at), known.at[0], known.at[1]};
  }
};

// (w - mean) * rstd * gamma + beta, the mean and variance those of the K taps of one weight channel over the map.
template <class scalar_t>
struct NormWeights {
  using acc = acc_t<scalar_t>;
  PlainWeights<scalar_t> raw;
  const acc* mean;        // [N, G*Cw]
  const acc* rstd;        // [N, G*Cw]
  const scalar_t* gamma;  // [G*Cw*K], or null: 1
  const scalar_t* beta;   // [G*Cw*K], or null: 0

  struct Window {
    typename PlainWeights<scalar_t>::Window raw;
    acc mean, rstd;
    const scalar_t* gamma;
    const scalar_t* beta;
    COTNET_DEVICE acc scale(int64_t t) const { return gamma ? load_wide(gamma + t) : acc(1); }
    COTNET_DEVICE acc normed(int64_t t) const { return (raw(t) - mean) * rstd; }
    COTNET_DEVICE acc operator()(int64_t t) const { return fma(normed(t), scale(t), beta ? load_wide(beta + t) : acc(0)); }
  };
  COTNET_DEVICE Window open(const WeightPlace& at) const {
    const int64_t first = at.group * at.taps;
    return {raw.open(at), load_wide(mean + at.unit()), load_wide(rstd + at.unit()), gamma ? gamma + first : nullptr,
            beta ? beta + first : nullptr};
  }
};

}  // namespace cotnet
