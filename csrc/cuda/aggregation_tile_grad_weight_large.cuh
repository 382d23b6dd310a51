// The gradient of the weights of 5 x 5 and 7 x 7 taps from tiles in shared memory. A thread owns four columns of one row of
// one weight channel, and computes a row of taps at a time: 20 or 28 sums, to which all channels that share the weight come
// one after another. They are all in the tile, and so is a place for every tap's gradient, from where it leaves as weights
// came.
//
// What goes back through a softmax is computed twice rather than kept, as 100 or 196 sums would fill the registers. There is
// no kernel of both gradients: of the 130 elements for 7 x 7 taps and 8 channels that two kernels move, it would spare 8.
#pragma once

#include "cuda/aggregation_tile_sinks.cuh"

namespace cotnet {

// ---- rows of taps

// d[v] = sum over channels of grad_y * x, with x where tap v of this row leads; zero from outside of the map. x: the
// thread's column in the row that the taps read, of the first channel. What is read beside the map is not used.
template <int kSize, class scalar_t>
COTNET_DEVICE void sum_row_of_taps(const Tile& tile, const scalar_t* x, const scalar_t* g, int column, int width,
                                   bool row_inside, acc_t<scalar_t> (&d)[kSize][kTileColumns]) {
  using acc = acc_t<scalar_t>;
  constexpr int kHalo = kSize / 2, kAround = kTileColumns + 2 * kHalo;
  COTNET_UNROLL
  for (int v = 0; v < kSize; ++v) {
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) d[v][i] = 0;
  }
  if (!row_inside) return;
  COTNET_UNROLL_BY(1)
  for (int j = 0; j < tile.channels; ++j, x += tile.x_stride, g += tile.second_stride) {
    acc grads[kTileColumns], values[kAround];
    read_columns<1>(g, grads);
    COTNET_UNROLL
    for (int i = 0; i < kAround; ++i) values[i] = widen(x[i - kHalo]);
    COTNET_UNROLL
    for (int v = 0; v < kSize; ++v) {
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) d[v][i] = fma(grads[i], values[i + v], d[v][i]);
    }
  }
  COTNET_UNROLL
  for (int v = 0; v < kSize; ++v) {
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      const int from = column + i + v - kHalo;
      d[v][i] = from >= 0 && from < width ? d[v][i] : acc(0);
    }
  }
}

// What a sink makes of them. kLooks: every row is shown to look(w, d) first. finish(t, w, d): from the gradient of row t,
// t + 1, ... of the weights that were summed with to that of the stored weights w.
template <class Sink, int kSize>
struct RowSink;

template <class scalar_t, int kSize>
struct RowSink<PlainTileSink<scalar_t>, kSize> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kLooks = false;
  template <class Read>
  COTNET_DEVICE RowSink(const PlainTileSink<scalar_t>&, const WeightPlace&, const Read&) {}
  COTNET_DEVICE void finish(int, acc (&)[kSize][kTileColumns], acc (&)[kSize][kTileColumns]) const {}
};

template <class scalar_t, int kSize>
struct RowSink<SoftmaxTileSink<scalar_t>, kSize> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kLooks = true;
  TapWeights<SoftmaxWeights<scalar_t>, kTileColumns> taps;
  acc mean[kTileColumns] = {}, scale[kTileColumns];

  template <class Read>
  COTNET_DEVICE RowSink(const SoftmaxTileSink<scalar_t>& sink, const WeightPlace& at, const Read& read)
      : taps(sink.weights, at, read) {}
  COTNET_DEVICE void look(acc (&w)[kSize][kTileColumns], const acc (&d)[kSize][kTileColumns]) {
    COTNET_UNROLL
    for (int v = 0; v < kSize; ++v) {
      taps.transform(v, w[v]);
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) mean[i] = fma(w[v][i], d[v][i], mean[i]);
    }
  }
  COTNET_DEVICE void end_look() {
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      scale[i] = 1 / taps.total[i];
      mean[i] *= scale[i];
    }
  }
  COTNET_DEVICE void finish(int, acc (&w)[kSize][kTileColumns], acc (&d)[kSize][kTileColumns]) {
    COTNET_UNROLL
    for (int v = 0; v < kSize; ++v) {
      taps.transform(v, w[v]);
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) d[v][i] = w[v][i] * scale[i] * (d[v][i] - mean[i]);
    }
  }
};

template <class scalar_t, int kSize>
struct RowSink<NormTileSink<scalar_t>, kSize> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kLooks = false;
  typename NormWeights<scalar_t>::Window window;
  acc mean, mean_normed;

  template <class Read>
  COTNET_DEVICE RowSink(const NormTileSink<scalar_t>& sink, const WeightPlace& at, const Read&)
      : window(sink.weights.open(at)) {
    const Pack<double, 2> known = load_vec<2>(sink.means + 2 * at.unit());
    mean = acc(known.at[0]);
    mean_normed = acc(known.at[1]);
  }
  COTNET_DEVICE void finish(int t, acc (&w)[kSize][kTileColumns], acc (&d)[kSize][kTileColumns]) const {
    COTNET_UNROLL
    for (int v = 0; v < kSize; ++v) {
      const acc scale = window.scale(t + v);
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) {
        const acc normed = (w[v][i] - window.mean) * window.rstd;
        d[v][i] = window.rstd * fma(-normed, mean_normed, fma(scale, d[v][i], -mean));
      }
    }
  }
};

// A thread's part of the sums of d and of d * normalised weight for a row of taps. parts: [2 * kSize, items].
template <class scalar_t, int kSize>
COTNET_DEVICE void add_row_of_sums(const NormWeights<scalar_t>& weights, const WeightPlace& at,
                                   const acc_t<scalar_t> (&w)[kSize][kTileColumns],
                                   const acc_t<scalar_t> (&d)[kSize][kTileColumns], int stale, acc_t<scalar_t>* parts,
                                   int thread, int items) {
  const auto window = weights.open(at);
  COTNET_UNROLL
  for (int v = 0; v < kSize; ++v) {
    acc_t<scalar_t> sum = 0, sum_normed = 0;
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      if (i < stale) continue;
      sum += d[v][i];
      sum_normed = fma(d[v][i], (w[v][i] - window.mean) * window.rstd, sum_normed);
    }
    parts[2 * v * items + thread] = sum;
    parts[(2 * v + 1) * items + thread] = sum_normed;
  }
}

// ---- the kernel

template <class scalar_t, class Sink, int kSize>
COTNET_KERNEL(kTileThreads, 2)
aggregation_tile_grad_weight_large_kernel(const AggregationProblem p, const Tile tile, const Sink sink,
                                          const scalar_t* raw /* [N, Cw, kTaps, H, W], the stored weights */,
                                          const scalar_t* grad_y /* [N, C, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                                          scalar_t* grad_w /* [N, Cw, kTaps, H, W] */) {
  using acc = acc_t<scalar_t>;
  constexpr int kTaps = kSize * kSize, kHalo = kSize / 2;
  COTNET_SHARED_DYNAMIC(memory);
  // Before the first element is room for the barrier of the copies and the columns before it, which are read and not used.
  scalar_t* const x_tile = reinterpret_cast<scalar_t*>(memory) + kLargeHead / sizeof(scalar_t);  // [channels, planes, rows, W]
  scalar_t* const g_tile = x_tile + tile.second_start;                                           // [channels, planes, rows, W]
  scalar_t* const w_tile = x_tile + tile.w_start;                                                // [planes, kTaps, rows, W]
  [[maybe_unused]] acc* const parts = reinterpret_cast<acc*>(memory + tile.parts_start);  // [2 * kSize, planes, items]
  const int width = int(p.cols.out), height = int(p.rows.out), plane = height * width;
  const int threads = int(blockDim.x), thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const TilePlace<scalar_t, false, kSize> at(p, tile);
  const bool strips = tile.strips > 1;
  const int skipped = (at.first_row - at.first_loaded) * width, computed = strips ? at.rows * width : at.planes * plane;

  TileCopies<scalar_t> copies(tile.bulk, memory, 2 * tile.channels + (Sink::kNeedsWeights ? at.weight_runs(tile) : 0));
  if (Sink::kNeedsWeights) at.load_weights(copies, p, tile, w_tile, raw, thread, threads);
  scalar_t* const x_first = x_tile + at.x_place();  // of the first channel
  scalar_t* const g_first = g_tile + at.x_place(skipped);
  for (int j = warp; j < tile.channels; j += threads / 32) {
    const int64_t begin = at.channel(p, j);
    copies.load(x_first + j * tile.x_stride, x, begin, strips ? at.loaded * width : computed, lane, 32);
    copies.load(g_first + j * tile.second_stride, grad_y, begin + skipped, computed, lane, 32);
  }
  copies.wait();

  // Four columns as in the kernel of the output. The first `stale` ones are another thread's too, which stores them.
  const int line = quotient(thread, tile.per_segment), segment = thread - line * tile.segments;
  const int of_plane = quotient(line, tile.per_row), row = at.first_row + line - of_plane * tile.rows;
  const int column = segment * kTileColumns < width - kTileColumns ? segment * kTileColumns : width - kTileColumns;
  const int stale = segment * kTileColumns - column;
  const bool busy = of_plane < at.planes && row < height;
  const WeightPlace place{at.image, at.weight_channel + of_plane, p.weight_channels, int64_t(row) * width + column, plane,
                          kTaps};
  const scalar_t* const x_own = x_first + of_plane * plane + (row - at.first_loaded) * width + column;
  const scalar_t* const g_own = g_first + of_plane * plane + (row - at.first_row) * width + column;
  scalar_t* const w_own = w_tile + at.w_place() + of_plane * kTaps * plane + (row - at.first_row) * width + column;
  const auto read = [&](int t, acc (&w)[kTileColumns]) {
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) w[i] = i < stale ? acc(0) : widen(w_own[t * tile.w_stride + i]);
  };
  // Row u of the taps: the stored weights, where they are needed, and the gradient of those that were summed with.
  const auto open_row = [&](int u, acc (&w)[kSize][kTileColumns], acc (&d)[kSize][kTileColumns]) {
    const int source = row + u - kHalo;
    sum_row_of_taps(tile, x_own + (u - kHalo) * width, g_own, column, width, source >= 0 && source < height, d);
    if constexpr (Sink::kNeedsWeights) {
      COTNET_UNROLL
      for (int v = 0; v < kSize; ++v) read(u * kSize + v, w[v]);
    }
  };
  if constexpr (Sink::kSums) {
    const int items = at.rows * tile.segments;
    const int64_t unit = (at.first_row / tile.rows * p.batch + at.image) * p.weight_channels + at.weight_channel;
    COTNET_UNROLL_BY(1)
    for (int u = 0; u < kSize; ++u) {
      if (busy) {
        acc w[kSize][kTileColumns], d[kSize][kTileColumns];
        open_row(u, w, d);
        add_row_of_sums(sink.weights, place, w, d, stale, parts, thread, at.planes * items);
      }
      sync_block();
      sum_over_items<2 * kSize>(at.planes, items, parts, thread, threads, [&](int plane_of_block, int number, double total) {
        const int64_t to = (unit + plane_of_block) * 2 * kTaps + 2 * u * kSize + number;
        store_vec(sink.sums + to, Pack<double, 1>{{total}});
      });
      sync_block();  // the sums of the next row take their place
    }
  } else {
    if (busy) {
      RowSink<Sink, kSize> rows(sink, place, read);
      acc w[kSize][kTileColumns], d[kSize][kTileColumns];
      if constexpr (RowSink<Sink, kSize>::kLooks) {
        COTNET_UNROLL_BY(1)
        for (int u = 0; u < kSize; ++u) {
          open_row(u, w, d);
          rows.look(w, d);
        }
        rows.end_look();
      }
      COTNET_UNROLL_BY(1)
      for (int u = 0; u < kSize; ++u) {
        open_row(u, w, d);
        rows.finish(u * kSize, w, d);
        COTNET_UNROLL
        for (int v = 0; v < kSize; ++v) {
          COTNET_UNROLL
          for (int i = 0; i < kTileColumns; ++i)
            if (i >= stale) w_own[(u * kSize + v) * tile.w_stride + i] = narrow<scalar_t>(d[v][i]);
        }
      }
    }
    copies.ready_to_store();
    at.store_weights(copies, p, tile, grad_w, w_tile, thread, threads);
    copies.finish();
  }
}

}  // namespace cotnet
