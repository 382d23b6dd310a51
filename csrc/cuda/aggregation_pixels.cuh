// Aggregations of channels_last maps pixel by pixel, without shared memory: 5 x 5 and 7 x 7 taps, whose weights fill shared
// memory with few pixels, and all windows that the kernels of 3 x 3 taps are not made for.
//
// A thread owns one pixel, 16 bytes of neighbouring weight channels, and eight channels that share each. Tap by tap it reads
// the weights, widens and transforms them once for eight channels, and reads these channels at the pixel that the tap leads
// to: 16 bytes each, next to those of the neighbouring threads. Weights come from memory once; a pixel comes once for each
// tap, all but once of these from the caches. The gradient of the input is the same sum with the taps mirrored:
//     grad_x[q] = sum over t of w[t][q - d_t] * grad_y[q - d_t]
// Weights of [Cw, K] of a pixel, rather than tap by tap as [K, Cw], come element by element.
#pragma once

#include "cuda/aggregation.cuh"
#include "cuda/aggregation_pixels_launch.h"
#include "cuda/aggregation_tap_weights.cuh"

namespace cotnet {

// ---- neighbouring weight channels of one tap: from raw to what is summed. `position`: where they are of.

template <class Weights, int kVector>
struct PixelWeights : TapWeights<Weights, kVector> {
  using Taps = TapWeights<Weights, kVector>;
  using Taps::Taps;
  COTNET_DEVICE void transform(int t, int64_t, typename Taps::acc (&w)[kVector]) { Taps::transform(t, w); }
};

// Where a kernel before has left the largest logit and the scale of each window.
template <class scalar_t, int kVector>
struct PixelWeights<KnownSoftmaxWeights<scalar_t>, kVector> {
  using acc = acc_t<scalar_t>;
  const acc* known;
  int64_t plane;

  template <class Read>
  COTNET_DEVICE PixelWeights(const KnownSoftmaxWeights<scalar_t>& weights, const WeightPlace& at, const Read&)
      : known(weights.normalisers + 2 * at.unit() * at.plane), plane(at.plane) {}
  COTNET_DEVICE void transform(int, int64_t position, acc (&w)[kVector]) const {
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const Pack<acc, 2> window = load_vec<2>(known + 2 * (i * plane + position));
      w[i] = exponential(w[i] - window.at[0]) * window.at[1];
    }
  }
  COTNET_DEVICE void finish(acc (&)[kVector]) const {}
};

template <class scalar_t, int kVector>
struct PixelWeights<NormWeights<scalar_t>, kVector> {
  using acc = acc_t<scalar_t>;
  acc mean[kVector], rstd[kVector];
  const scalar_t *gamma, *beta;  // of the first weight channel
  int taps;

  template <class Read>
  COTNET_DEVICE PixelWeights(const NormWeights<scalar_t>& weights, const WeightPlace& at, const Read&)
      : gamma(weights.gamma ? weights.gamma + at.group * at.taps : nullptr),
        beta(weights.beta ? weights.beta + at.group * at.taps : nullptr),
        taps(int(at.taps)) {
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      mean[i] = load_wide(weights.mean + at.unit() + i);
      rstd[i] = load_wide(weights.rstd + at.unit() + i);
    }
  }
  COTNET_DEVICE void transform(int t, int64_t, acc (&w)[kVector]) const {
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const acc scale = gamma ? load_wide(gamma + i * taps + t) : acc(1), shift = beta ? load_wide(beta + i * taps + t) : acc(0);
      w[i] = fma((w[i] - mean[i]) * rstd[i], scale, shift);
    }
  }
  COTNET_DEVICE void finish(acc (&)[kVector]) const {}
};

// ---- vectors

template <class scalar_t, int kVector>
COTNET_DEVICE void widen_pack(const Pack<scalar_t, kVector>& pack, acc_t<scalar_t> (&to)[kVector]) {
  if constexpr (sizeof(scalar_t) == 2) {
    const auto words = bit_cast<Pack<uint32_t, kVector / 2>>(pack);
    COTNET_UNROLL
    for (int i = 0; i < kVector; i += 2) widen_pair<scalar_t>(words.at[i / 2], to[i], to[i + 1]);
  } else {
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) to[i] = pack.at[i];
  }
}
template <int kVector, class scalar_t>
COTNET_DEVICE void widen_vector(const scalar_t* from, acc_t<scalar_t> (&to)[kVector]) {
  widen_pack(load_vec<kVector>(from), to);
}
template <int kVector, class scalar_t>
COTNET_DEVICE void store_vector(scalar_t* to, const acc_t<scalar_t> (&from)[kVector]) {
  Pack<scalar_t, kVector> pack;
  COTNET_UNROLL
  for (int i = 0; i < kVector; ++i) pack.at[i] = narrow<scalar_t>(from[i]);
  store_vec(to, pack);
}

// Rows or columns of a window in 32 bits.
struct PixelAxis {
  int in, out, stride, padding, dilation;

  COTNET_DEVICE explicit PixelAxis(const Axis& a)
      : in(int(a.in)), out(int(a.out)), stride(int(a.stride)), padding(int(a.padding)), dilation(int(a.dilation)) {}
  // Where tap u of output i reads, and which output reads input i by tap u; -1: nowhere, none.
  COTNET_DEVICE int source(int i, int u) const {
    const int at = i * stride - padding + u * dilation;
    return at < in ? at : -1;
  }
  COTNET_DEVICE int reader(int i, int u) const {
    const int at = i + padding - u * dilation, place = stride == 1 ? at : at / stride;
    return at >= 0 && place * stride == at && place < out ? place : -1;
  }
};

// ---- sums over taps

// kMirrored: the gradient of the input, from x = grad_y to y = grad_x.
template <class scalar_t, class Weights, bool kMirrored, class Tail>
COTNET_KERNEL(kPixelThreads, 3)
aggregation_pixels_kernel(const AggregationProblem p, const Pixels pixels, const Weights weights,
                          const scalar_t* raw /* [N, Cw, K, Ho, Wo] */, const scalar_t* x /* [N, C, H, W] */,
                          scalar_t* y /* [N, C, Ho, Wo] */, const Tail tail) {
  using acc = acc_t<scalar_t>;
  constexpr int kVector = 16 / int(sizeof(scalar_t));
  int64_t rest = int64_t(blockIdx.x) * kPixelThreads + threadIdx.x;
  if (rest >= pixels.threads) return;
  const int64_t channel = split(rest, pixels.vectors) * kVector, chunk = split(rest, pixels.shares);
  const int column = int(split(rest, kMirrored ? p.cols.in : p.cols.out));
  const int row = int(split(rest, kMirrored ? p.rows.in : p.rows.out));
  const int64_t image = rest;
  const PixelAxis rows(p.rows), columns(p.cols);
  const int from_width = kMirrored ? columns.out : columns.in, to_width = kMirrored ? columns.in : columns.out;
  const int64_t own = int64_t(row) * to_width + column, from_plane = kMirrored ? p.out_plane() : p.in_plane();
  const int64_t to_plane = kMirrored ? p.in_plane() : p.out_plane();
  const int64_t first = channel + chunk * kPixelSharers * p.weight_channels;
  const scalar_t* const from = x + image * from_plane * p.channels + first;
  const int kernel = int(p.cols.kernel), step = int(p.weight_channels);

  const WeightPlace place{image, channel, p.weight_channels, own, p.out_plane(), p.taps()};
  const scalar_t* const window = raw + (image * p.out_plane() * p.weight_channels + (p.tap_major ? 0 : channel)) * p.taps() +
                                 (p.tap_major ? channel : 0);
  const auto read = [&](int t, int64_t position, acc (&w)[kVector]) {
    const scalar_t* const at = window + position * p.weight_channels * p.taps();
    if (p.tap_major) {
      widen_vector(at + int64_t(t) * p.weight_channels, w);
    } else {
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) w[i] = load_wide(at + i * p.taps() + t);
    }
  };
  PixelWeights<Weights, kVector> source(weights, place, [&](int t, acc (&w)[kVector]) { read(t, own, w); });
  acc sums[kPixelSharers][kVector] = {};
  COTNET_UNROLL_BY(1)
  for (int u = 0; u < int(p.rows.kernel); ++u) {
    const int h = kMirrored ? rows.reader(row, u) : rows.source(row, u);
    if (kMirrored && h < 0) continue;
    COTNET_UNROLL_BY(1)
    for (int v = 0; v < kernel; ++v) {
      const int l = kMirrored ? columns.reader(column, v) : columns.source(column, v);
      if (kMirrored && l < 0) continue;
      const int t = u * kernel + v;
      const int64_t there = int64_t(h) * from_width + l;
      acc w[kVector];
      read(t, kMirrored ? there : own, w);
      source.transform(t, there, w);
      if (h < 0 || l < 0) continue;  // after a softmax has counted the weights
      const scalar_t* const pixel = from + there * p.channels;
      COTNET_UNROLL
      for (int j = 0; j < kPixelSharers; ++j) {
        acc values[kVector];
        widen_vector(pixel + j * step, values);
        COTNET_UNROLL
        for (int i = 0; i < kVector; ++i) sums[j][i] = fma(w[i], values[i], sums[j][i]);
      }
    }
  }
  scalar_t* const to = y + (image * to_plane + own) * p.channels + first;
  COTNET_UNROLL
  for (int j = 0; j < kPixelSharers; ++j) {
    source.finish(sums[j]);
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) sums[j][i] = tail.of(first + j * step + i)(sums[j][i]);
    store_vector(to + j * step, sums[j]);
  }
}

// True when the kernel was launched. raw: the weights before their transformation.
template <bool kMirrored, class scalar_t, class Weights, class Tail = NoTail>
bool try_aggregation_pixels(const AggregationProblem& p, const Weights& weights, const scalar_t* raw, const scalar_t* x,
                            scalar_t* y, Stream stream, const Tail& tail = {}) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = alignment_of(raw) == 16 && alignment_of(x) == 16 && alignment_of(y) == 16;
    const Pixels pixels = choose_aggregation_pixels(p, sizeof(scalar_t), aligned, kMirrored);
    if (!pixels.possible()) return false;
    launch_kernel(&aggregation_pixels_kernel<scalar_t, Weights, kMirrored, Tail>, pixels.launch, stream, p, pixels, weights,
                  raw, x, y, tail);
    return true;
  }
}

// ---- the gradient of the weights

// A thread owns one row of kTaps taps of one vector of weight channels at one pixel: its sums over the channels that share
// them, of grad_y at the pixel and x where the taps lead.
template <class scalar_t, int kTaps>
COTNET_KERNEL(kPixelThreads, 3)
aggregation_pixels_grad_weight_kernel(const AggregationProblem p, const Pixels pixels,
                                      const scalar_t* grad_y /* [N, C, Ho, Wo] */, const scalar_t* x /* [N, C, H, W] */,
                                      scalar_t* grad_w /* [N, Cw, K, Ho, Wo] */) {
  using acc = acc_t<scalar_t>;
  constexpr int kVector = 16 / int(sizeof(scalar_t));
  int64_t rest = int64_t(blockIdx.x) * kPixelThreads + threadIdx.x;
  if (rest >= pixels.threads) return;
  const int64_t channel = split(rest, pixels.vectors) * kVector;
  const int u = int(split(rest, pixels.shares)), column = int(split(rest, p.cols.out)), row = int(split(rest, p.rows.out));
  const int64_t image = rest, position = image * p.out_plane() + int64_t(row) * p.cols.out + column;
  const PixelAxis rows(p.rows), columns(p.cols);
  const int h = rows.source(row, u);
  const scalar_t* from = x + (image * p.in_plane() + int64_t(h < 0 ? 0 : h) * p.cols.in) * p.channels + channel;
  const scalar_t* grads = grad_y + position * p.channels + channel;
  acc sums[kTaps][kVector] = {};
  COTNET_UNROLL_BY(1)
  for (int64_t j = h < 0 ? p.sharing() : 0; j < p.sharing(); ++j, from += p.weight_channels, grads += p.weight_channels) {
    acc g[kVector];
    widen_vector(grads, g);
    COTNET_UNROLL
    for (int v = 0; v < kTaps; ++v) {
      const int l = columns.source(column, v);
      acc values[kVector];
      widen_pack(load_vec_if<kVector>(from + int64_t(l < 0 ? 0 : l) * p.channels, l >= 0), values);
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) sums[v][i] = fma(g[i], values[i], sums[v][i]);
    }
  }
  scalar_t* const to = grad_w + position * p.weight_channels * p.taps();
  COTNET_UNROLL
  for (int v = 0; v < kTaps; ++v) {
    const int t = u * kTaps + v;
    if (columns.source(column, v) < 0) {  // where nothing was read; what was multiplied with it may be infinite
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) sums[v][i] = 0;
    }
    if (p.tap_major) {
      store_vector(to + t * p.weight_channels + channel, sums[v]);
    } else {
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) store_narrow(to + (channel + i) * p.taps() + t, sums[v][i]);
    }
  }
}

// True when the kernel was launched.
template <class scalar_t>
bool try_aggregation_pixels_grad_weight(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x,
                                        scalar_t* grad_w, Stream stream) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = alignment_of(grad_y) == 16 && alignment_of(x) == 16 && alignment_of(grad_w) == 16;
    const Pixels pixels = choose_aggregation_pixels_grad_weight(p, sizeof(scalar_t), aligned);
    if (!pixels.possible()) return false;
    const auto launch = [&](auto* kernel) { launch_kernel(kernel, pixels.launch, stream, p, pixels, grad_y, x, grad_w); };
    if (p.cols.kernel == 5) launch(&aggregation_pixels_grad_weight_kernel<scalar_t, 5>);
    else launch(&aggregation_pixels_grad_weight_kernel<scalar_t, 7>);
    return true;
  }
}

}  // namespace cotnet
