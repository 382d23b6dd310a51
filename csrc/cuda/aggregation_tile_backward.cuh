// Both gradients of 3 x 3 aggregations in one kernel: grad_y, x and the weights come from memory once, where a kernel for
// each gradient reads grad_y twice.
//
// A thread owns four columns of one row of one weight channel. First it sums the gradient of its 9 x 4 weights over the
// channels that share them, from grad_y and x. Then nobody needs x any more: grad_x, from grad_y and the weights, takes its
// place channel by channel. Last, grad_w takes the place of the weights. A kind of weights (below) says what is between the
// weights as they are stored and those that were summed with.
#pragma once

#include "cuda/aggregation_tile_backward_launch.h"
#include "cuda/aggregation_tile_grad_weight.cuh"

namespace cotnet {

// What a kind of weights sees of a thread and its block.
template <class scalar_t>
struct BackwardView {
  using acc = acc_t<scalar_t>;
  const TilePlace<scalar_t, true>& at;
  const BackwardTile& tile;
  scalar_t* w_tile;  // [planes, 9, loaded rows, W], the stored weights
  acc* extra;        // what the kind asked for of each position or plane
  acc* sums;         // where x and grad_y were
  int width, height, plane;
  int thread, threads;
  int of_plane, row, column, segment;
  bool busy;

  // Place among the loaded positions of all planes.
  COTNET_DEVICE int position() const { return of_plane * plane + (row - at.first_loaded) * width + column; }
  COTNET_DEVICE scalar_t* stored(int t) const {
    return w_tile + at.w_place() + of_plane * 9 * plane + t * tile.w_stride + (row - at.first_loaded) * width + column;
  }
};

// ---- kinds of weights

template <class scalar_t>
struct PlainBackward {
  using acc = acc_t<scalar_t>;
  static constexpr BackwardNeeds needs() { return {}; }
  static constexpr bool kPrepares = false, kFinishes = false, kGradWeight = true;
  COTNET_DEVICE void begin(const AggregationProblem&, const BackwardView<scalar_t>&) const {}
  COTNET_DEVICE void mirrored(const AggregationProblem&, const BackwardView<scalar_t>&, int,
                              acc (&)[3][kTileColumns]) const {}
};

// Largest logit and 1/(sum of exponentials) of every loaded window stand in shared memory: the gradient of the input needs
// those of its neighbours.
template <class scalar_t>
struct SoftmaxBackward {
  using acc = acc_t<scalar_t>;
  static constexpr BackwardNeeds needs() { return softmax_backward_needs(); }
  static constexpr bool kPrepares = true, kFinishes = true, kGradWeight = true;
  COTNET_DEVICE void begin(const AggregationProblem&, const BackwardView<scalar_t>&) const {}

  COTNET_DEVICE void prepare(const BackwardView<scalar_t>& v) const {
    const int positions = v.tile.strips > 1 ? v.at.loaded * v.width : v.at.planes * v.plane;
    COTNET_UNROLL_BY(1)
    for (int i = v.thread; i < positions; i += v.threads) {
      const int of_plane = v.tile.strips > 1 ? 0 : i / v.plane;
      acc logits[9], sum = 0;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t)
        logits[t] = widen(v.w_tile[v.at.w_place() + of_plane * 8 * v.plane + t * v.tile.w_stride + i]);
      acc top = logits[0];
      COTNET_UNROLL
      for (int t = 1; t < 9; ++t) top = logits[t] > top ? logits[t] : top;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) sum += exponential(logits[t] - top);
      known(v.extra, i) = {{top, 1 / sum}};
    }
  }
  COTNET_DEVICE void mirrored(const AggregationProblem&, const BackwardView<scalar_t>& v, int u,
                              acc (&w)[3][kTileColumns]) const {
    const int row = v.row + 1 - u, down = row < 0 || row >= v.height ? 0 : (1 - u) * v.width;
    COTNET_UNROLL
    for (int c = -1; c <= kTileColumns; ++c) {
      const bool inside = v.column + c >= 0 && v.column + c < v.width;
      const Pack<acc, 2> window = known(v.extra, v.position() + down + (inside ? c : 0));
      COTNET_UNROLL
      for (int t = 0; t < 3; ++t) {
        const int i = c + t - 1;
        if (i >= 0 && i < kTileColumns) w[t][i] = exponential(w[t][i] - window.at[0]) * window.at[1];
      }
    }
  }
  // From the gradient d of the probabilities to that of the logits, column by column.
  COTNET_DEVICE void finish(const AggregationProblem&, const BackwardView<scalar_t>& v, acc (&d)[9][kTileColumns]) const {
    if (!v.busy) return;
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      const Pack<acc, 2> window = known(v.extra, v.position() + i);
      acc chances[9], mean = 0;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) {
        chances[t] = exponential(widen(v.stored(t)[i]) - window.at[0]) * window.at[1];
        mean = fma(chances[t], d[t][i], mean);
      }
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) d[t][i] = chances[t] * (d[t][i] - mean);
    }
  }

 private:
  static COTNET_DEVICE Pack<acc, 2>& known(acc* extra, int i) { return reinterpret_cast<Pack<acc, 2>*>(extra)[i]; }
};

// Sums over the map of the gradient d of the normalised weights, and of d times them: all that the gradient of the stored
// ones needs of its group.
template <class scalar_t, bool kWholeMaps>
struct NormBackward {
  using acc = acc_t<scalar_t>;
  static constexpr BackwardNeeds needs() { return norm_backward_needs(kWholeMaps); }
  // Of strips of a map there are sums only: another kernel makes grad_w of them.
  static constexpr bool kPrepares = false, kFinishes = true, kGradWeight = kWholeMaps;
  NormSumsSink<scalar_t> sums;

  // What a normalised weight is made with: gamma * rstd and beta of each tap, then mean and rstd. [planes, 10, 2]
  COTNET_DEVICE void begin(const AggregationProblem& p, const BackwardView<scalar_t>& v) const {
    for (int i = v.thread; i < 10 * v.at.planes; i += v.threads) {
      const int of_plane = i / 10, t = i - 10 * of_plane;
      const auto window = sums.weights.open({v.at.image, v.at.weight_channel + of_plane, p.weight_channels, 0, v.plane, 9});
      Pack<acc, 2> pair{{window.mean, window.rstd}};
      if (t < 9) pair = {{window.scale(t) * window.rstd, window.beta ? load_wide(window.beta + t) : acc(0)}};
      affine(v, of_plane)[t] = pair;
    }
  }
  COTNET_DEVICE void mirrored(const AggregationProblem&, const BackwardView<scalar_t>& v, int u,
                              acc (&w)[3][kTileColumns]) const {
    const Pack<acc, 2>* const known = affine(v, v.of_plane);
    const acc mean = known[9].at[0];
    COTNET_UNROLL
    for (int t = 0; t < 3; ++t) {
      const Pack<acc, 2> tap = known[u * 3 + t];
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) w[t][i] = fma(w[t][i] - mean, tap.at[0], tap.at[1]);
    }
  }
  COTNET_DEVICE void finish(const AggregationProblem& p, const BackwardView<scalar_t>& v, acc (&d)[9][kTileColumns]) const {
    const int items = v.at.rows * v.tile.segments;
    double* const totals = reinterpret_cast<double*>(v.sums);  // [planes, 9, 2]
    acc* const lines = v.sums + 36 * v.tile.planes;            // [planes, 2]
    acc* const parts = lines + 2 * v.tile.planes;              // [18, planes, items]
    if (v.busy) add(v, d, parts, v.at.planes * items);
    sync_block();
    const int64_t unit = (v.at.first_row / v.tile.rows * p.batch + v.at.image) * p.weight_channels + v.at.weight_channel;
    sums.reduce(unit, v.at.planes, items, parts, v.thread, v.threads, kWholeMaps ? totals : nullptr);
    if constexpr (kWholeMaps) {
      sync_block();
      if (v.thread < v.at.planes) {
        const Pack<acc, 2>* const known = affine(v, v.thread);
        double sum = 0, sum_normed = 0;
        COTNET_UNROLL_BY(1)
        for (int t = 0; t < 9; ++t) {
          sum += double(known[t].at[0]) * totals[v.thread * 18 + 2 * t];
          sum_normed += double(known[t].at[0]) * totals[v.thread * 18 + 2 * t + 1];
        }
        lines[2 * v.thread] = acc(-sum / (9 * v.plane));
        lines[2 * v.thread + 1] = acc(-sum_normed / (9 * v.plane)) * known[9].at[1];
      }
      sync_block();
      if (v.busy) apply(v, lines[2 * v.of_plane], lines[2 * v.of_plane + 1], d);
    }
  }

 private:
  static COTNET_DEVICE Pack<acc, 2>* affine(const BackwardView<scalar_t>& v, int of_plane) {
    return reinterpret_cast<Pack<acc, 2>*>(v.extra) + 10 * of_plane;
  }
  // A thread's part of the 18 sums. The first columns of the last segment of a row are another thread's too.
  COTNET_DEVICE void add(const BackwardView<scalar_t>& v, const acc (&d)[9][kTileColumns], acc* parts, int items) const {
    const Pack<acc, 2> moments = affine(v, v.of_plane)[9];
    const int stale = v.segment * kTileColumns - v.column;
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      const scalar_t* const w = v.stored(t);
      acc sum = 0, sum_normed = 0;
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) {
        const acc own = i < stale ? acc(0) : d[t][i];
        sum += own;
        sum_normed = fma(own, widen(w[i]) - moments.at[0], sum_normed);
      }
      parts[2 * t * items + v.thread] = sum;
      parts[(2 * t + 1) * items + v.thread] = sum_normed * moments.at[1];
    }
  }
  // grad_w = rstd * (gamma * d - mean of gamma * d - normed * mean of gamma * d * normed): a line in the stored weight, the
  // same for all of a group, beside d.
  COTNET_DEVICE void apply(const BackwardView<scalar_t>& v, acc shift, acc slope, acc (&d)[9][kTileColumns]) const {
    const Pack<acc, 2>* const known = affine(v, v.of_plane);
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      const scalar_t* const w = v.stored(t);
      const acc scale = known[t].at[0];
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) d[t][i] = fma(scale, d[t][i], fma(slope, widen(w[i]) - known[9].at[0], shift));
    }
  }
};

// ---- the kernel

// Columns column - 1 to column + 4 of a row in shared memory, or what stands beside the map there.
template <int kVector, class scalar_t>
COTNET_DEVICE void read_window(const scalar_t* from, acc_t<scalar_t> (&values)[kTileColumns + 2]) {
  values[0] = widen(from[-1]);
  read_columns<kVector>(from, values + 1);
  values[kTileColumns + 1] = widen(from[kTileColumns]);
}

// d += the gradient of the weights from one channel: rows above, the same and below of x.
template <int kVector, class scalar_t>
COTNET_DEVICE void add_grad_weight(const scalar_t* g, const scalar_t* const (&rows)[3],
                                   acc_t<scalar_t> (&d)[9][kTileColumns]) {
  acc_t<scalar_t> grads[kTileColumns];
  read_columns<kVector>(g, grads);
  COTNET_UNROLL
  for (int u = 0; u < 3; ++u) {
    acc_t<scalar_t> values[kTileColumns + 2];
    read_window<kVector>(rows[u], values);
    COTNET_UNROLL
    for (int v = 0; v < 3; ++v) {
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) d[u * 3 + v][i] = fma(grads[i], values[i + v], d[u * 3 + v][i]);
    }
  }
}

// The gradient of the input of one channel: rows below, the same and above of grad_y, those outside of the map as zeros.
template <int kVector, class scalar_t>
COTNET_DEVICE void sum_grad_input(const scalar_t* const (&rows)[3], const acc_t<scalar_t> (&w)[9][kTileColumns],
                                  bool first_column, bool last_column, acc_t<scalar_t> (&sums)[kTileColumns]) {
  COTNET_UNROLL
  for (int i = 0; i < kTileColumns; ++i) sums[i] = 0;
  COTNET_UNROLL
  for (int u = 0; u < 3; ++u) {
    acc_t<scalar_t> values[kTileColumns + 2];
    read_window<kVector>(rows[u], values);
    values[0] = first_column ? acc_t<scalar_t>(0) : values[0];
    values[kTileColumns + 1] = last_column ? acc_t<scalar_t>(0) : values[kTileColumns + 1];
    COTNET_UNROLL
    for (int v = 0; v < 3; ++v) {
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) sums[i] = fma(w[u * 3 + v][i], values[i + 2 - v], sums[i]);
    }
  }
}

// Row u of the weights that grad_x is summed with: tap t of a position comes from where tap t leads to it, zero from outside
// of the map.
template <int kVector, class scalar_t, class Kind>
COTNET_DEVICE void read_mirrored(const AggregationProblem& p, const Kind& kind, const BackwardView<scalar_t>& view, int u,
                                 bool first_row, bool last_row, bool first_column, bool last_column,
                                 acc_t<scalar_t> (&w)[9][kTileColumns]) {
  using acc = acc_t<scalar_t>;
  const bool outside = (u == 0 && last_row) || (u == 2 && first_row);
  acc taps[3][kTileColumns];
  COTNET_UNROLL
  for (int v = 0; v < 3; ++v) {
    acc values[kTileColumns + 2];
    read_window<kVector>(view.stored(u * 3 + v) + (outside ? 0 : (1 - u) * view.width), values);
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) taps[v][i] = values[i + 2 - v];
  }
  kind.mirrored(p, view, u, taps);
  COTNET_UNROLL
  for (int v = 0; v < 3; ++v) {
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      const bool beside = (v == 0 && i == kTileColumns - 1 && last_column) || (v == 2 && i == 0 && first_column);
      w[u * 3 + v][i] = outside || beside ? acc(0) : taps[v][i];
    }
  }
}

// What was summed with a row or a column outside of the map becomes zero.
template <class acc>
COTNET_DEVICE void drop_outside(bool first_row, bool last_row, bool first_column, bool last_column,
                                acc (&d)[9][kTileColumns]) {
  COTNET_UNROLL
  for (int t = 0; t < 9; ++t) {
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      const bool above = t / 3 == 0 && first_row, below = t / 3 == 2 && last_row;
      const bool before = t % 3 == 0 && i == 0 && first_column, behind = t % 3 == 2 && i == kTileColumns - 1 && last_column;
      d[t][i] = above || below || before || behind ? acc(0) : d[t][i];
    }
  }
}

template <class scalar_t, class Kind, int kVector>
COTNET_KERNEL(kTileThreads, 2)
aggregation_tile_backward_kernel(const AggregationProblem p, const BackwardTile tile, const Kind kind,
                                 const scalar_t* raw /* [N, Cw, 9, H, W], the stored weights */,
                                 const scalar_t* grad_y /* [N, C, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                                 scalar_t* grad_x /* [N, C, H, W] */, scalar_t* grad_w /* [N, Cw, 9, H, W] */) {
  using acc = acc_t<scalar_t>;
  using Place = TilePlace<scalar_t, true>;
  COTNET_SHARED_DYNAMIC(memory);
  // Two barriers of copies; zeros for a row outside of the map with a column on either side; the place of the block, which
  // is the same for all threads and would cost each some 16 registers.
  scalar_t* const zeros = reinterpret_cast<scalar_t*>(memory) + 32 / sizeof(scalar_t);
  const Place& at = *reinterpret_cast<Place*>(memory + 64);
  static_assert(64 + sizeof(Place) <= kBackwardHead, "the head is too small");
  scalar_t* const x_tile = reinterpret_cast<scalar_t*>(memory) + kBackwardHead / sizeof(scalar_t);  // [channels, planes, rows, W]
  scalar_t* const g_tile = x_tile + tile.second_start;                                              // [channels, planes, rows, W]
  scalar_t* const w_tile = x_tile + tile.w_start;                                                   // [planes, 9, rows, W]
  const int thread = int(threadIdx.x), threads = int(blockDim.x), warp = thread / 32, lane = thread % 32;
  if (thread == 0) *reinterpret_cast<Place*>(memory + 64) = Place(p, tile);
  if (thread < 12) reinterpret_cast<uint32_t*>(memory)[4 + thread] = 0;
  sync_block();
  TileCopies<scalar_t> maps(tile.bulk, memory, 2 * tile.channels), weights(tile.bulk, memory + 8, at.weight_runs(tile));

  const int width = int(p.cols.out), height = int(p.rows.out), plane = height * width;
  const bool strips = tile.strips > 1;
  const int skipped = (at.first_row - at.first_loaded) * width, computed = strips ? at.rows * width : at.planes * plane;
  const int line = quotient(thread, tile.per_segment), segment = thread - line * tile.segments;
  const int of_plane = quotient(line, tile.per_row), row = at.first_row + line - of_plane * tile.rows;
  const int column = segment * kTileColumns < width - kTileColumns ? segment * kTileColumns : width - kTileColumns;
  const bool busy = of_plane < at.planes && row < height;
  const bool first_column = column == 0, last_column = column == width - kTileColumns;
  const bool first_row = row == 0, last_row = row == height - 1;
  const BackwardView<scalar_t> view{at, tile, w_tile, reinterpret_cast<acc*>(memory + tile.extra_start),
                                    reinterpret_cast<acc*>(x_tile), width, height, plane, thread, threads, of_plane, row,
                                    column, segment, busy};

  acc d[9][kTileColumns] = {};  // the gradient of the weights that were summed with
  for (int turn = 0, done = 0; turn < tile.turns; ++turn, done += tile.channels) {
    const int channels = int(p.sharing()) - done < tile.channels ? int(p.sharing()) - done : tile.channels;
    const int start = at.x_place(done * at.x_step), offset = start + view.position();  // of the first channel
    if (turn > 0) {  // a warp loads into what it has stored from
      maps.finish();
      sync_warp();
    }
    for (int j = warp; j < tile.channels; j += threads / 32) {
      if (j >= channels) {
        maps.load_nothing(lane);
        maps.load_nothing(lane);
        continue;
      }
      const int64_t begin = at.channel(p, done + j);
      const int elements = strips ? at.loaded * width : computed;
      maps.load(x_tile + start + j * tile.x_stride, x, begin, elements, lane, 32);
      maps.load(g_tile + start + j * tile.x_stride, grad_y, begin, elements, lane, 32);
    }
    if (turn == 0) {
      at.load_weights(weights, p, tile, w_tile, raw, thread, threads);
      kind.begin(p, view);
    }
    maps.wait();

    if (busy) {
      // Rows outside of the map: another is read, and what comes of it not used.
      const scalar_t* const own = x_tile + offset;
      const scalar_t* rows[3] = {own - (first_row ? 0 : width), own, own + (last_row ? 0 : width)};
      const scalar_t* g = g_tile + offset;
      COTNET_UNROLL_BY(1)
      for (int j = 0; j < channels; ++j) {
        add_grad_weight<kVector>(g, rows, d);
        g += tile.x_stride;
        COTNET_UNROLL
        for (int u = 0; u < 3; ++u) rows[u] += tile.x_stride;
      }
    }
    if (turn == 0) weights.wait();
    sync_block();  // nobody reads x any more
    if constexpr (Kind::kPrepares) {
      if (turn == 0) kind.prepare(view);
      sync_block();
    }
    if (busy) {
      acc w[9][kTileColumns];
      COTNET_UNROLL
      for (int u = 0; u < 3; ++u)
        read_mirrored<kVector>(p, kind, view, u, first_row, last_row, first_column, last_column, w);
      const scalar_t* const own = g_tile + offset;
      const scalar_t* rows[3] = {last_row ? zeros : own + width, own, first_row ? zeros : own - width};
      const int steps[3] = {last_row ? 0 : tile.x_stride, tile.x_stride, first_row ? 0 : tile.x_stride};
      scalar_t* to = x_tile + offset;
      COTNET_UNROLL_BY(1)
      for (int j = 0; j < channels; ++j) {
        acc sums[kTileColumns];
        sum_grad_input<kVector>(rows, w, first_column, last_column, sums);
        write_columns<kVector>(to, sums);
        to += tile.x_stride;
        COTNET_UNROLL
        for (int u = 0; u < 3; ++u) rows[u] += steps[u];
      }
    }
    maps.ready_to_store();
    for (int j = warp; j < channels; j += threads / 32) {
      scalar_t* const from = x_tile + start + j * tile.x_stride + skipped;
      maps.store(grad_x, from, at.channel(p, done + j) + skipped, computed, lane, 32);
    }
  }

  drop_outside(first_row, last_row, first_column, last_column, d);
  maps.finish();
  if constexpr (Kind::kFinishes) {
    sync_block();  // grad_x has left
    kind.finish(p, view, d);
    sync_block();  // nobody reads the weights any more
  }
  if constexpr (Kind::kGradWeight) {
    if (busy) {
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) write_columns<kVector>(view.stored(t), d[t]);
    }
    weights.ready_to_store();
    scalar_t* const from = w_tile + at.w_place() + skipped;
    if (!strips) weights.store(grad_w, from, at.tap(p, 0), 9 * computed, thread, threads);
    for (int t = warp; strips && t < 9; t += threads / 32)
      weights.store(grad_w, from + t * tile.w_stride, at.tap(p, t) + skipped, computed, lane, 32);
    weights.finish();
  }
}

// True when the kernel was launched. grad_w may be null where the kind makes sums only.
template <class scalar_t, class Kind>
bool try_aggregation_tile_backward(const AggregationProblem& p, const Kind& kind, const scalar_t* raw,
                                   const scalar_t* grad_y, const scalar_t* x, scalar_t* grad_x, scalar_t* grad_w,
                                   const DeviceNumbers& numbers, Stream stream) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = alignment_of(raw) == 16 && alignment_of(grad_y) == 16 && alignment_of(x) == 16 &&
                         alignment_of(grad_x) == 16 && (!Kind::kGradWeight || alignment_of(grad_w) == 16);
    const BackwardTile tile = choose_aggregation_tile_backward(p, sizeof(scalar_t), aligned, Kind::needs(), numbers);
    if (!tile.possible()) return false;
    const auto launch = [&](auto* kernel) {
      launch_kernel(kernel, tile.launch, stream, p, tile, kind, raw, grad_y, x, grad_x, grad_w);
    };
    if (tile.vector == 4) launch(&aggregation_tile_backward_kernel<scalar_t, Kind, 4>);
    else if (tile.vector == 2) launch(&aggregation_tile_backward_kernel<scalar_t, Kind, 2>);
    else launch(&aggregation_tile_backward_kernel<scalar_t, Kind, 1>);
    return true;
  }
}

}  // namespace cotnet
