// Loops of group_norm_aggregation: the aggregation with weights normalised over their taps and the map. Included once
// per target namespace by foreach_target.h. A unit's weights are read for the statistics and, while they are still in
// cache, for the aggregation; normalising is one multiply-add on the way into a register.
#include "cpu/stage.h"
#include "cpu/weights.h"
#include "cpu/weight_fields.h"
#include "cpu/window_nchw.h"
#include "cpu/direct_nchw.h"
#include "cpu/aggregation_nchw.h"
#include "cpu/window_nhwc.h"
#include "cpu/aggregation_nhwc.h"
#include "cpu/drivers.h"
#include "cpu/group_norm_nhwc.h"

// Vectors summed in acc_t before their sum moves into a double: keeps long sums as exact as short ones.
constexpr int64_t kSumVectors = 256;

struct Itself {
  template <class V>
  COTNET_INLINE V operator()(V v) const {
    return v;
  }
};

template <class acc>
struct SquaredDistance {
  acc centre;
  COTNET_INLINE Vec<acc> operator()(Vec<acc> v) const { return (v - centre) * (v - centre); }
};

// Sum of body(value) over `size` contiguous elements.
template <class scalar_t, class Body>
double long_sum(const scalar_t* from, int64_t size, const Body& body) {
  using acc = acc_t<scalar_t>;
  constexpr int lanes = kLanes<acc>;
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kSumVectors * 2 * lanes) {
    const int64_t end = std::min(begin + kSumVectors * 2 * lanes, size);
    Vec<acc> even = {}, odd = {};
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      even += body(load(from + i));
      odd += body(load(from + i + lanes));
    }
    for (; i < end; i += lanes) {
      const int64_t count = std::min<int64_t>(lanes, end - i);
      even += keep(first_lanes<acc>(count), body(load_upto(from + i, count)));
    }
    total += double(sum_lanes<acc>(even + odd));
  }
  return total;
}

// Mean and 1/sqrt(variance + eps) of one group: the mean first, then squares of what remains.
template <class scalar_t>
void group_statistics(const scalar_t* w, int64_t size, double eps, acc_t<scalar_t>* mean, acc_t<scalar_t>* rstd) {
  using acc = acc_t<scalar_t>;
  const double average = long_sum(w, size, Itself()) / double(size);
  const double squares = long_sum(w, size, SquaredDistance<acc>{acc(average)});
  *mean = acc(average);
  *rstd = acc(1 / std::sqrt(squares / double(size) + eps));
}

template <class scalar_t>
NormField<scalar_t> norm_field(const GroupNormOperands<scalar_t>& a) {
  return {{a.w}, a.mean, a.rstd, a.gamma, a.beta};
}

// tail: what is done to y while it is in cache, see NoTail.
template <class scalar_t, class Parallel, class Tail = NoTail>
void group_norm_aggregation_forward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps, scalar_t* y,
                                    const Parallel& parallel, const Tail& tail = {}) {
  if (p.channels_last) return group_norm_forward_nhwc(p, a, eps, y, parallel, tail);
  const int64_t size = p.taps() * p.out_plane();
  const auto statistics = [&](int64_t n, int64_t m) {
    for (int64_t g = 0; g < p.heads; ++g) {
      const int64_t group = p.group(n, g, m);
      group_statistics(a.w + group * size, size, eps, a.mean + group, a.rstd + group);
    }
  };
  const NormField<scalar_t> field = norm_field(a);
  if (p.batch * p.weight_channels >= 4 * parallel.threads()) {
    for_whole_units(p, field, parallel, 1, [&](auto& tiles, int64_t n, int64_t m, int64_t begin, int64_t end) {
      statistics(n, m);
      for (int64_t band = begin; band < end; ++band) tiles.forward(n, m, band, a.x, y);
      tail.planes(n, m);
    });
  } else {  // too few units to keep the threads busy: statistics first, then bands
    parallel(p.batch * p.weight_channels, p.heads * size, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) statistics(unit / p.weight_channels, unit % p.weight_channels);
    });
    for_units(p, field, parallel, [&](auto& tiles, int64_t n, int64_t m, int64_t band) { tiles.forward(n, m, band, a.x, y); });
    tail.all_planes(parallel);
  }
}

// Keeps the gradient d of a unit's normalised weights and sums, per tap, d and d * (normalised weight without affine).
template <class scalar_t>
class GroupNormSink {
 public:
  using acc = acc_t<scalar_t>;
  GroupNormSink(const scalar_t* w, int64_t taps, int64_t plane, acc mean, acc rstd, acc* unit, Vec<acc>* sums)
      : w_(w), taps_(taps), plane_(plane), mean_(mean), rstd_(rstd), unit_(unit), sums_(sums) {}

  COTNET_INLINE void operator()(int64_t position, const Vec<acc>* grads, int64_t count, int64_t fresh) {
    const Mask<acc> counted = first_lanes<acc>(count) & ~first_lanes<acc>(fresh);
    for (int64_t t = 0; t < taps_; ++t) {
      store_upto(unit_ + t * plane_ + position, grads[t], count);
      const Vec<acc> d = keep(counted, grads[t]);
      const Vec<acc> normed = (load_upto(w_ + t * plane_ + position, count) - mean_) * rstd_;
      sums_[2 * t] += d;
      sums_[2 * t + 1] += keep(counted, d * normed);
    }
  }

 private:
  const scalar_t* w_;
  const int64_t taps_, plane_;
  const acc mean_, rstd_;
  acc* unit_;       // [K, plane]
  Vec<acc>* sums_;  // [K, 2]
};

// Gradients of one unit. With xhat = (w - mean) * rstd and M = K * plane,
//     grad_w = rstd * (gamma_t * d - (sum of gamma*d)/M - xhat * (sum of gamma*d*xhat)/M) = a_t * d + b * w + c.
template <class scalar_t>
class GroupNormUnit {
 public:
  using acc = acc_t<scalar_t>;
  explicit GroupNormUnit(const AggregationProblem& p)
      : p_(p), unit_(size_t(p.taps() * p.out_plane()) * sizeof(acc)), totals_(size_t(2 * p.taps()) * sizeof(double)),
        sums_(size_t(2 * p.taps()) * sizeof(Vec<acc>)) {}

  // grad_gamma, grad_beta: [K] of this image and weight channel, or null.
  template <class Tiles>
  void run(Tiles& tiles, const GroupNormOperands<scalar_t>& a, int64_t n, int64_t g, int64_t m, const scalar_t* grad_y,
           scalar_t* grad_w, acc* grad_gamma, acc* grad_beta) {
    const int64_t taps = p_.taps(), plane = p_.out_plane(), group = p_.group(n, g, m);
    const scalar_t* const w = a.w + group * taps * plane;
    const acc mean = a.mean[group], rstd = a.rstd[group];
    double* const totals = totals_.as<double>();
    Vec<acc>* const sums = sums_.as<Vec<acc>>();
    std::fill(totals, totals + 2 * taps, 0.0);
    for (int64_t band = 0; band < Tiles::bands(p_); ++band) {
      std::fill(sums, sums + 2 * taps, Vec<acc>{});
      tiles.grad_weight_of(n, g, m, band, a.x, grad_y,
                           GroupNormSink<scalar_t>(w, taps, plane, mean, rstd, unit_.as<acc>(), sums));
      for (int64_t i = 0; i < 2 * taps; ++i) totals[i] += double(sum_lanes<acc>(sums[i]));
    }
    for (int64_t t = 0; t < taps; ++t) {
      if (grad_beta) grad_beta[t] = acc(totals[2 * t]);
      if (grad_gamma) grad_gamma[t] = acc(totals[2 * t + 1]);
    }
    if (grad_w) apply(w, a.gamma ? a.gamma + group % (p_.heads * p_.weight_channels) * taps : nullptr, mean, rstd, grad_w + group * taps * plane);
  }

 private:
  void apply(const scalar_t* w, const scalar_t* gamma, acc mean, acc rstd, scalar_t* grad_w) {
    const int64_t taps = p_.taps(), plane = p_.out_plane();
    double sum = 0, sum_normed = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const double scale = gamma ? double(widen(gamma[t])) : 1.0;
      sum += scale * totals_.as<double>()[2 * t];
      sum_normed += scale * totals_.as<double>()[2 * t + 1];
    }
    const double elements = double(taps * plane), r = double(rstd);
    const acc b = acc(-r * r * sum_normed / elements);
    const acc c = acc(-r * sum / elements - double(b) * double(mean));
    for (int64_t t = 0; t < taps; ++t) {
      const acc a = gamma ? rstd * widen(gamma[t]) : rstd;
      for (int64_t q = t * plane; q < (t + 1) * plane; q += kLanes<acc>) {
        const int64_t count = std::min<int64_t>(kLanes<acc>, (t + 1) * plane - q);
        store_upto(grad_w + q, a * load_upto(unit_.as<acc>() + q, count) + (b * load_upto(w + q, count) + c), count);
      }
    }
  }

  const AggregationProblem& p_;
  const Scratch unit_;    // acc [K, plane]: the gradient of the normalised weights
  const Scratch totals_;  // double [K, 2]: sums of it, and of it times the normalised weight
  const Scratch sums_;    // Vec [K, 2]: the same for one band
};

// Any gradient may be null; grad_gamma and grad_beta are [N, G*Cw*K], one row per image.
template <class scalar_t, class Parallel>
void group_norm_aggregation_backward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, const scalar_t* grad_y,
                                     scalar_t* grad_x, scalar_t* grad_w, acc_t<scalar_t>* grad_gamma, acc_t<scalar_t>* grad_beta,
                                     const Parallel& parallel) {
  if (p.channels_last) return group_norm_backward_nhwc(p, a, grad_y, grad_x, grad_w, grad_gamma, grad_beta, parallel);
  const bool weights = grad_w || grad_gamma || grad_beta;
  const auto row = [&](acc_t<scalar_t>* grads, int64_t group) { return grads ? grads + group * p.taps() : nullptr; };
  for_whole_units(p, norm_field(a), parallel, 1, [&](auto& tiles, int64_t n, int64_t m, int64_t begin, int64_t end) {
    if (weights) {
      GroupNormUnit<scalar_t> unit(p);
      for (int64_t g = 0; g < p.heads; ++g) {
        const int64_t group = p.group(n, g, m);
        unit.run(tiles, a, n, g, m, grad_y, grad_w, row(grad_gamma, group), row(grad_beta, group));
      }
    }
    if (grad_x)
      for (int64_t band = begin; band < end; ++band) tiles.grad_input(n, m, band, grad_y, grad_x);
  });
}
