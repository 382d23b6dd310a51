// Both gradients of a 3 x 3 aggregation on channels_last maps in one kernel, which reads grad_y, x and the weights once:
//     grad_x[q] = sum over t of w[t][q - d_t] * grad_y[q - d_t]
//     grad_w[t][q] = sum over the channels that share the weight of grad_y[q] * x[q + d_t]
// A block walks down the rows as the forward does. One half of its threads computes grad_x, the other grad_w: a thread owns
// one pixel and four weight channels, with all channels that share them, and needs nothing of others but what was loaded.
#pragma once

#include "cuda/aggregation_image.cuh"

namespace cotnet {

// What a softmax needs of its window at every pixel in shared memory: largest logit and 1/(sum of exponentials).
template <class acc>
struct ImageNormalisers {
  acc* top;    // [ring, columns + 2, slab]
  acc* scale;  // the same
};

// [9, Cw] of the slab in the place of [Cw, 9], and the normalisers of a softmax, for row `place` of the ring. The threads
// that have the channels of one pixel are neighbours in a warp: all read before any writes.
template <bool kSoftmax, class scalar_t>
COTNET_DEVICE void prepare_row(scalar_t* rows, const ImageFeed<scalar_t>& feed, int place, int columns, int slab,
                               bool tap_major, const ImageNormalisers<acc_t<scalar_t>>& normalisers) {
  using acc = acc_t<scalar_t>;
  const int quads = slab / kImageQuad, quad = int(threadIdx.x) & (quads - 1), items = columns * quads;
  COTNET_UNROLL_BY(1)
  for (int first = 0; first < items; first += int(blockDim.x)) {
    const int column = (first + int(threadIdx.x)) / quads;
    const bool busy = column < columns;
    scalar_t* const pixel = rows + feed.at(place, column);
    Pack<scalar_t, kImageQuad> raw[9] = {};
    COTNET_UNROLL
    for (int k = 0; k < 9; ++k) {
      const int from = tap_major ? k * slab + quad * kImageQuad : (quad * 9 + k) * kImageQuad;
      if (busy) raw[k] = *reinterpret_cast<const Pack<scalar_t, kImageQuad>*>(pixel + from);
    }
    if (!tap_major) {
      sync_warp();
      Pack<scalar_t, kImageQuad> mended[9];
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) {
        COTNET_UNROLL
        for (int i = 0; i < kImageQuad; ++i) mended[t].at[i] = raw[(i * 9 + t) / kImageQuad].at[(i * 9 + t) % kImageQuad];
        if (busy) *reinterpret_cast<Pack<scalar_t, kImageQuad>*>(pixel + t * slab + quad * kImageQuad) = mended[t];
      }
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) raw[t] = mended[t];
    }
    if constexpr (kSoftmax) {
      Pack<acc, kImageQuad> tops, scales;
      COTNET_UNROLL
      for (int i = 0; i < kImageQuad; ++i) {
        acc top = widen(raw[0].at[i]), sum = 0;
        COTNET_UNROLL
        for (int t = 1; t < 9; ++t) top = widen(raw[t].at[i]) > top ? widen(raw[t].at[i]) : top;
        COTNET_UNROLL
        for (int t = 0; t < 9; ++t) sum += fast_exponential(widen(raw[t].at[i]) - top);
        tops.at[i] = top;
        scales.at[i] = 1 / sum;
      }
      if (busy) {
        const int at = (place * (feed.rows.line / feed.rows.pitch) + column) * slab + quad * kImageQuad;
        *reinterpret_cast<Pack<acc, kImageQuad>*>(normalisers.top + at) = tops;
        *reinterpret_cast<Pack<acc, kImageQuad>*>(normalisers.scale + at) = scales;
      }
    }
  }
}

// Tap t of four weight channels, transformed. `known`: of its pixel, from these channels on.
template <class Weights, class acc>
COTNET_DEVICE void transform_tap(const Weights&, int t, const acc* numbers, int slab, const acc* top, const acc* scale,
                                 acc (&w)[kImageQuad]) {
  if constexpr (kIsSoftmax<Weights>) {
    acc tops[kImageQuad], scales[kImageQuad];
    read_quad(top, tops);
    read_quad(scale, scales);
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) w[i] = fast_exponential(w[i] - tops[i]) * scales[i];
  } else if constexpr (kIsNorm<Weights>) {
    acc mean[kImageQuad], rstd[kImageQuad], gamma[kImageQuad], beta[kImageQuad];
    read_quad(numbers, mean);
    read_quad(numbers + slab, rstd);
    read_quad(numbers + (2 + t) * slab, gamma);
    read_quad(numbers + (11 + t) * slab, beta);
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) w[i] = fma(w[i] - mean[i], rstd[i] * gamma[i], beta[i]);
  }
}

// From the gradient d of the weights that were summed with to that of the stored weights w, tap-major at this pixel.
template <class Weights, class scalar_t>
COTNET_DEVICE void finish_gradient(const Weights& weights, const scalar_t* w, const acc_t<scalar_t>* numbers, int slab,
                                   acc_t<scalar_t> (&d)[9][kImageQuad]) {
  using acc = acc_t<scalar_t>;
  if constexpr (kIsSoftmax<Weights>) {
    acc p[9][kImageQuad];
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) read_quad(w + t * slab, p[t]);
    transform_window(weights, numbers, slab, p);
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) {
      acc mean = 0;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) mean = fma(p[t][i], d[t][i], mean);
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) d[t][i] = p[t][i] * (d[t][i] - mean);
    }
  } else if constexpr (kIsNorm<Weights>) {
    acc mean[kImageQuad], rstd[kImageQuad], mean_d[kImageQuad], mean_normed[kImageQuad];
    read_quad(numbers, mean);
    read_quad(numbers + slab, rstd);
    read_quad(numbers + 20 * slab, mean_d);
    read_quad(numbers + 21 * slab, mean_normed);
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      acc raw[kImageQuad], gamma[kImageQuad];
      read_quad(w + t * slab, raw);
      read_quad(numbers + (2 + t) * slab, gamma);
      COTNET_UNROLL
      for (int i = 0; i < kImageQuad; ++i) {
        const acc normed = (raw[i] - mean[i]) * rstd[i];
        d[t][i] = fma(-normed, mean_normed[i], fma(gamma[i], d[t][i], -mean_d[i])) * rstd[i];
      }
    }
  }
}

// The sums over a block's pixels of d and of d * normalised weight, for each tap: a thread's 72, then over threads.
template <class acc>
struct ImageSums {
  acc sum[9][kImageQuad] = {}, normed[9][kImageQuad] = {};

  template <class scalar_t>
  COTNET_DEVICE void add(const scalar_t* w, const acc* numbers, int slab, const acc (&d)[9][kImageQuad]) {
    acc mean[kImageQuad], rstd[kImageQuad];
    read_quad(numbers, mean);
    read_quad(numbers + slab, rstd);
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      acc raw[kImageQuad];
      read_quad(w + t * slab, raw);
      COTNET_UNROLL
      for (int i = 0; i < kImageQuad; ++i) {
        sum[t][i] += d[t][i];
        normed[t][i] = fma(d[t][i], (raw[i] - mean[i]) * rstd[i], normed[t][i]);
      }
    }
  }
  // parts: [72, threads] in shared memory, where everybody has done with what was there. sums: [parts of a map, N*Cw, 9, 2]
  COTNET_DEVICE void reduce(const AggregationProblem& p, const ImagePlace& at, int slab, acc* parts, double* sums) const {
    const int threads = int(blockDim.x), thread = int(threadIdx.x), quads = slab / kImageQuad;
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      COTNET_UNROLL
      for (int i = 0; i < kImageQuad; ++i) {
        parts[((t * 2) * kImageQuad + i) * threads + thread] = sum[t][i];
        parts[((t * 2 + 1) * kImageQuad + i) * threads + thread] = normed[t][i];
      }
    }
    sync_block();
    const int64_t unit = (at.part * p.batch + at.image) * p.weight_channels + at.channel;
    for (int number = thread; number < 18 * slab; number += threads) {
      const int c = number / 18, of_channel = number - c * 18;
      double total = 0;
      for (int i = c / kImageQuad; i < threads; i += quads)
        total += double(parts[(of_channel * kImageQuad + c % kImageQuad) * threads + i]);
      if (c < at.channels) store_vec(sums + (unit + c) * 18 + of_channel, Pack<double, 1>{{total}});
    }
  }
};

// Any of grad_x and grad_w may be null, as the tile was chosen for. With kSums neither is written: sums for group norm are.
template <class scalar_t, class Weights, bool kSums, int kPiece>
COTNET_KERNEL(kSums ? kImageThreads : kImageBackwardThreads, 2)
aggregation_image_backward_kernel(const AggregationProblem p, const ImageTile tile, const Weights weights,
                                  const double* means /* [N, Cw, 2] */, double* sums /* [parts of a map, N*Cw, 9, 2] */,
                                  const scalar_t* grad_y /* [N, C, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                                  const scalar_t* raw /* [N, Cw, 9, H, W] */, scalar_t* grad_x /* [N, C, H, W] */,
                                  scalar_t* grad_w /* [N, Cw, 9, H, W] */) {
  using acc = acc_t<scalar_t>;
  constexpr int kTogether = kImageTogether<scalar_t>;
  const ImageSlab<scalar_t, kPiece> slab{tile};
  constexpr bool kPlain = !kIsSoftmax<Weights> && !kIsNorm<Weights>;
  COTNET_SHARED_DYNAMIC(memory);
  const ImagePlace at(p, tile);
  const bool has_w = !kPlain || grad_x, has_x = kSums || grad_w;
  const int pixels = tile.columns + 2;
  acc* const table = reinterpret_cast<acc*>(memory);  // [kImageTable, slab]
  acc* const known = table + (kIsNorm<Weights> ? kImageTable * slab : 0);
  const int known_size = kIsSoftmax<Weights> ? tile.ring * pixels * slab : 0;
  const ImageNormalisers<acc> normalisers{known, known + known_size};
  const ImageFeed<scalar_t> feed(tile.map, at, 1);                           // [ring, columns + 2, pitch]
  const ImageFeed<scalar_t> w_feed(tile.weights, at, p.tap_major ? 1 : 9);  // the same
  scalar_t* const g_rows = reinterpret_cast<scalar_t*>(known + 2 * known_size);
  scalar_t* const x_rows = g_rows + tile.ring * feed.rows.line;
  scalar_t* const w_rows = x_rows + tile.ring * feed.rows.line;
  scalar_t* const staged = w_rows + tile.ring * w_feed.rows.line;  // [step, columns, 9 * slab]: rows of grad_w
  fill_table(weights, p, at, slab, means, table);
  [[maybe_unused]] ImageSums<acc> total;

  // A pixel `row` rows below the first of a step, and four weight channels.
  const bool second = int(threadIdx.x) >= tile.pass_threads;
  const bool for_x = !kSums && grad_x && !second;
  const int thread = int(threadIdx.x) - (second ? tile.pass_threads : 0);
  const int quads = slab / kImageQuad, quad = thread & (quads - 1), pixel = thread / quads;
  const int row = pixel / tile.columns, column = pixel - row * tile.columns, sharing = int(p.sharing());
  const bool mine = column < at.columns && row < tile.step && quad * kImageQuad < at.channels;
  const acc* const numbers = table + quad * kImageQuad;

  const auto load = [&](int k, int place) {  // row k of the block, counted from the one before its first
    feed.load(at, at.first_row - 1 + k, grad_y, g_rows + place * feed.rows.line);
    if (has_x) feed.load(at, at.first_row - 1 + k, x, x_rows + place * feed.rows.line);
    if (has_w) w_feed.load(at, at.first_row - 1 + k, raw, w_rows + place * w_feed.rows.line);
  };
  const int loaded = at.rows + 2;
  COTNET_UNROLL_BY(1)
  for (int k = 0; k < tile.step + 2 && k < loaded; ++k) load(k, k);
  cp_async_commit();
  int place = 0;  // in the rings, of the row before the first of the step
  for (int first = 0; first < at.rows; first += tile.step) {
    cp_async_wait<0>();
    sync_block();  // these rows have come; all have done with the rows before, which the next ones replace
    if (has_w && (kIsSoftmax<Weights> || !p.tap_major)) {
      COTNET_UNROLL_BY(1)
      for (int k = first == 0 ? 0 : 2; k < tile.step + 2 && first + k < loaded; ++k)
        prepare_row<kIsSoftmax<Weights>>(w_rows, w_feed, around(place, k, tile.ring), at.columns + 2, slab, p.tap_major,
                                         normalisers);
    }
    COTNET_UNROLL_BY(1)
    for (int k = tile.step + 2; k < 2 * tile.step + 2 && first + k < loaded; ++k)
      load(first + k, around(place, k, tile.ring));
    cp_async_commit();
    sync_block();
    const bool busy = mine && first + row < at.rows;
    const unsigned lanes = ballot(kAllLanes, busy);
    const int64_t at_row = (at.image * at.height + at.first_row + first + row) * at.width + at.first_column + column;
    if (busy && for_x) {
      // The window, mirrored: tap t of the pixel that tap t leads here from.
      acc w[9][kImageQuad];
      const scalar_t* window[3];
      COTNET_UNROLL
      for (int u = 0; u < 3; ++u) {
        const int line = around(place, row + 2 - u, tile.ring);
        window[u] = g_rows + feed.at(line, column) + quad * kImageQuad;
        COTNET_UNROLL
        for (int v = 0; v < 3; ++v) {
          const int t = u * 3 + v, from = (line * pixels + column + 2 - v) * slab + quad * kImageQuad;
          read_quad(w_rows + w_feed.at(line, column + 2 - v) + t * slab + quad * kImageQuad, w[t]);
          transform_tap(weights, t, numbers, slab, normalisers.top + from, normalisers.scale + from, w[t]);
        }
      }
      scalar_t* to = grad_x + at_row * p.channels + at.channel + quad * kImageQuad;
      COTNET_UNROLL_BY(1)
      for (int j = 0; j < sharing; j += kTogether, to += kTogether * p.weight_channels) {
        acc result[kTogether][kImageQuad] = {};
        COTNET_UNROLL
        for (int t = 0; t < 9; ++t) {
          COTNET_UNROLL
          for (int k = 0; k < kTogether; ++k) {
            acc values[kImageQuad];
            read_quad(window[t / 3] + (2 - t % 3) * feed.rows.pitch + (j + k) * slab, values);
            COTNET_UNROLL
            for (int i = 0; i < kImageQuad; ++i) result[k][i] = fma(w[t][i], values[i], result[k][i]);
          }
        }
        store_quads(to, p.weight_channels, result, lanes);
      }
    }
    if (busy && !for_x) {
      acc d[9][kImageQuad] = {};
      const scalar_t* window[3];
      COTNET_UNROLL
      for (int u = 0; u < 3; ++u)
        window[u] = x_rows + feed.at(around(place, row + u, tile.ring), column) + quad * kImageQuad;
      const int line = around(place, row + 1, tile.ring);
      const scalar_t* const grads = g_rows + feed.at(line, column + 1) + quad * kImageQuad;
      COTNET_UNROLL_BY(kTogether)
      for (int j = 0; j < sharing; ++j) {
        acc g[kImageQuad];
        read_quad(grads + j * slab, g);
        COTNET_UNROLL
        for (int t = 0; t < 9; ++t) {
          acc values[kImageQuad];
          read_quad(window[t / 3] + t % 3 * feed.rows.pitch + j * slab, values);
          COTNET_UNROLL
          for (int i = 0; i < kImageQuad; ++i) d[t][i] = fma(g[i], values[i], d[t][i]);
        }
      }
      const scalar_t* const own = w_rows + w_feed.at(line, column + 1) + quad * kImageQuad;
      if constexpr (kSums) {
        total.add(own, numbers, slab, d);
      } else {
        finish_gradient(weights, own, numbers, slab, d);
        scalar_t* const to = staged + (row * tile.columns + column) * w_feed.rows.pitch;
        if (p.tap_major) {
          COTNET_UNROLL
          for (int t = 0; t < 9; ++t) write_quad(to + t * slab + quad * kImageQuad, d[t]);
        } else {
          COTNET_UNROLL
          for (int k = 0; k < 9; ++k) {
            acc four[kImageQuad];
            COTNET_UNROLL
            for (int i = 0; i < kImageQuad; ++i) four[i] = d[(k * kImageQuad + i) % 9][(k * kImageQuad + i) / 9];
            write_quad(to + (quad * 9 + k) * kImageQuad, four);
          }
        }
      }
    }
    if constexpr (!kSums) {
      if (grad_w) {
        sync_block();
        COTNET_UNROLL_BY(1)
        for (int k = 0; k < tile.step && first + k < at.rows; ++k)
          w_feed.store(at, at.first_row + first + k, grad_w, staged + k * tile.columns * w_feed.rows.pitch);
      }
    }
    place = around(place, tile.step, tile.ring);
  }
  if constexpr (kSums) {
    sync_block();  // the sums take the place of the rows
    total.reduce(p, at, slab, table + kImageTable * slab, sums);
  }
}

template <class scalar_t, class Weights, bool kSums>
bool try_image_backward(const AggregationProblem& p, const Weights& weights, const double* means, double* sums,
                        const scalar_t* grad_y, const scalar_t* x, const scalar_t* raw, scalar_t* grad_x, scalar_t* grad_w,
                        const DeviceNumbers& numbers, Stream stream) {
  const auto fits = [](const void* pointer) { return !pointer || alignment_of(pointer) == 16; };
  ImageNeeds needs;
  needs.grad_x = grad_x;
  needs.grad_w = grad_w || kSums;
  needs.softmax = kIsSoftmax<Weights>;
  needs.norm = kIsNorm<Weights>;
  needs.sums = kSums;
  const bool aligned = fits(grad_y) && fits(x) && fits(raw) && fits(grad_x) && fits(grad_w);
  const ImageTile tile = choose_aggregation_image(p, sizeof(scalar_t), aligned && needs.backward(), needs, numbers);
  if (!tile.possible()) return false;
  const auto launch = [&](auto* kernel) {
    launch_kernel(kernel, tile.launch, stream, p, tile, weights, means, sums, grad_y, x, raw, grad_x, grad_w);
  };
  if constexpr (sizeof(scalar_t) == 4) launch(&aggregation_image_backward_kernel<scalar_t, Weights, kSums, 0>);
  else if (tile.slab == 16) launch(&aggregation_image_backward_kernel<scalar_t, Weights, kSums, 32>);
  else launch(&aggregation_image_backward_kernel<scalar_t, Weights, kSums, 16>);
  return true;
}

// True when the kernel was launched, for the gradients that are not null. raw: the weights before their transformation;
// means: of what group norm subtracts from grad_w.
template <class scalar_t, class Weights>
bool try_aggregation_image_backward(const AggregationProblem& p, const Weights& weights, const scalar_t* grad_y,
                                    const scalar_t* x, const scalar_t* raw, scalar_t* grad_x, scalar_t* grad_w,
                                    const DeviceNumbers& numbers, Stream stream, const double* means = nullptr) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    return try_image_backward<scalar_t, Weights, false>(p, weights, means, nullptr, grad_y, x, raw, grad_x, grad_w, numbers,
                                                        stream);
  }
}

// The same for the sums of the gradients that group norm needs. sums: [parts of a map, N*Cw, 9, 2].
template <class scalar_t>
bool try_aggregation_image_sums(const AggregationProblem& p, const NormWeights<scalar_t>& weights, const scalar_t* grad_y,
                                const scalar_t* x, double* sums, const DeviceNumbers& numbers, Stream stream) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    return try_image_backward<scalar_t, NormWeights<scalar_t>, true>(p, weights, nullptr, sums, grad_y, x, weights.raw.w,
                                                                     nullptr, nullptr, numbers, stream);
  }
}

}  // namespace cotnet
