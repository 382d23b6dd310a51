// What becomes of the gradient of the weights that a tile kernel has summed: it is stored as it is, goes back through a
// softmax or a group norm, or is summed over the map.
#pragma once

#include "cuda/aggregation_tile.cuh"

namespace cotnet {

// From the gradient d of the weights that were summed with to that of the weights as they are stored. w: the stored ones.
template <class scalar_t>
struct PlainTileSink {
  static constexpr bool kNeedsWeights = false, kSums = false;
  using acc = acc_t<scalar_t>;
  COTNET_DEVICE void finish(const WeightPlace&, acc (&)[9][kTileColumns], acc (&)[9][kTileColumns]) const {}
};

template <class scalar_t>
struct SoftmaxTileSink {
  using acc = acc_t<scalar_t>;
  static constexpr bool kNeedsWeights = true, kSums = false;
  SoftmaxWeights<scalar_t> weights;

  COTNET_DEVICE void finish(const WeightPlace& at, acc (&w)[9][kTileColumns], acc (&d)[9][kTileColumns]) const {
    transform(weights, at, w);
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      acc mean = 0;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) mean = fma(w[t][i], d[t][i], mean);
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) d[t][i] = w[t][i] * (d[t][i] - mean);
    }
  }
};

template <class scalar_t>
struct NormTileSink {
  using acc = acc_t<scalar_t>;
  static constexpr bool kNeedsWeights = true, kSums = false;
  NormWeights<scalar_t> weights;
  const double* means;  // [N, G*Cw, 2]: of gamma * d and of gamma * d * normalised weight, over the group

  COTNET_DEVICE void finish(const WeightPlace& at, acc (&w)[9][kTileColumns], acc (&d)[9][kTileColumns]) const {
    const auto window = weights.open(at);
    const Pack<double, 2> known = load_vec<2>(means + 2 * at.unit());
    const acc mean = acc(known.at[0]), mean_normed = acc(known.at[1]);
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      const acc scale = window.scale(t);
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) {
        const acc normed = (w[t][i] - window.mean) * window.rstd;
        d[t][i] = window.rstd * fma(-normed, mean_normed, fma(scale, d[t][i], -mean));
      }
    }
  }
};

// Eight threads sum each of kNumbers numbers of a plane over its `items` threads, then over each other; one of them calls
// take(plane, number, total). parts: [kNumbers, planes, items] in shared memory. All threads of the block must come.
template <int kNumbers, class acc, class Take>
COTNET_DEVICE void sum_over_items(int planes, int items, const acc* parts, int thread, int threads, const Take& take) {
  for (int first = 0; first < 8 * kNumbers * planes; first += threads) {
    const int part = (first + thread) % 8, number = (first + thread) / 8 % kNumbers;
    const int of_plane = (first + thread) / (8 * kNumbers);
    double total = 0;
    if (of_plane < planes)
      for (int i = part; i < items; i += 8) total += double(parts[(number * planes + of_plane) * items + i]);
    for (int distance = 4; distance > 0; distance /= 2) total += shuffle_xor(kAllLanes, total, distance);
    if (part == 0 && of_plane < planes) take(of_plane, number, total);
  }
}

// No gradient, but sums over the map of d and d * normalised weight, which NormTileSink needs the means of.
template <class scalar_t>
struct NormSumsSink {
  using acc = acc_t<scalar_t>;
  static constexpr bool kNeedsWeights = true, kSums = true;
  NormWeights<scalar_t> weights;
  double* sums;  // [strips, N*Cw, taps, 2]

  // parts: [18, busy threads] in shared memory. A thread's four columns, of which the first `stale` are another thread's too.
  COTNET_DEVICE void add(const WeightPlace& at, const acc (&w)[9][kTileColumns], const acc (&d)[9][kTileColumns], int stale,
                         acc* parts, int thread, int busy) const {
    const auto window = weights.open(at);
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      acc sum = 0, sum_normed = 0;
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) {
        if (i < stale) continue;
        sum += d[t][i];
        sum_normed = fma(d[t][i], (w[t][i] - window.mean) * window.rstd, sum_normed);
      }
      parts[2 * t * busy + thread] = sum;
      parts[(2 * t + 1) * busy + thread] = sum_normed;
    }
  }
  // totals: [planes, 18] in shared memory for those who need them in this block, or null.
  COTNET_DEVICE void reduce(int64_t first_unit, int planes, int items, const acc* parts, int thread, int threads,
                            double* totals = nullptr) const {
    sum_over_items<18>(planes, items, parts, thread, threads, [&](int of_plane, int number, double total) {
      store_vec(sums + (first_unit + of_plane) * 18 + number, Pack<double, 1>{{total}});
      if (totals) totals[of_plane * 18 + number] = total;
    });
  }
};

}  // namespace cotnet
