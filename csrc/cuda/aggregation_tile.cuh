// Aggregations of 3 x 3 taps, stride 1, from tiles in shared memory: NCHW maps of any size. A tile comes in runs of
// contiguous memory, by asynchronous copies of all of it or of 16 bytes each, and the output leaves the same way: rows of 14
// or 28 bytes, whose ends no vector fits, are met in shared memory only.
//
// A thread owns four columns of one row and up to eight channels that share their weights: 36 weights and 32 sums in
// registers, each weight widened and transformed once for eight channels. The gradient of the input is the same sum with the taps
// mirrored and every weight taken from where it was applied: grad_x[q] = sum over t of w[t][q - d_t] * grad_y[q - d_t].
#pragma once

#include "cuda/aggregation_tile_copies.cuh"
#include "cuda/aggregation_tile_launch.h"
#include "cuda/weights.cuh"

namespace cotnet {

// ---- weights of the nine taps at four columns: from raw to what is summed

template <class scalar_t>
COTNET_DEVICE void transform(const PlainWeights<scalar_t>&, const WeightPlace&, acc_t<scalar_t> (&)[9][kTileColumns]) {}

template <class scalar_t>
COTNET_DEVICE void transform(const SoftmaxWeights<scalar_t>&, const WeightPlace&, acc_t<scalar_t> (&w)[9][kTileColumns]) {
  COTNET_UNROLL
  for (int i = 0; i < kTileColumns; ++i) {
    acc_t<scalar_t> top = w[0][i], sum = 0;
    COTNET_UNROLL
    for (int t = 1; t < 9; ++t) top = w[t][i] > top ? w[t][i] : top;
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      w[t][i] = exponential(w[t][i] - top);
      sum += w[t][i];
    }
    const acc_t<scalar_t> scale = 1 / sum;
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) w[t][i] *= scale;
  }
}

template <class scalar_t>
COTNET_DEVICE void transform(const NormWeights<scalar_t>& weights, const WeightPlace& at,
                             acc_t<scalar_t> (&w)[9][kTileColumns]) {
  const auto window = weights.open(at);
  COTNET_UNROLL
  for (int t = 0; t < 9; ++t) {
    const acc_t<scalar_t> scale = window.scale(t), shift = window.beta ? load_wide(window.beta + t) : acc_t<scalar_t>(0);
    COTNET_UNROLL
    for (int i = 0; i < kTileColumns; ++i) w[t][i] = fma((w[t][i] - window.mean) * window.rstd, scale, shift);
  }
}

// The same for the mirrored sum: w[t][i] is of the position that tap t leads to column i from, a row and a column away.
template <class Weights, class acc>
COTNET_DEVICE void transform_mirrored(const Weights& weights, const WeightPlace& at, int /* row */, int /* column */,
                                      int /* height */, int /* width */, acc (&w)[9][kTileColumns]) {
  transform(weights, at, w);
}

template <class scalar_t>
COTNET_DEVICE void transform_mirrored(const KnownSoftmaxWeights<scalar_t>& weights, const WeightPlace& at, int row, int column,
                                      int height, int width, acc_t<scalar_t> (&w)[9][kTileColumns]) {
  using acc = acc_t<scalar_t>;
  const acc* const unit = weights.normalisers + 2 * at.unit() * at.plane;
  COTNET_UNROLL
  for (int u = 0; u < 3; ++u) {
    COTNET_UNROLL
    for (int c = -1; c <= kTileColumns; ++c) {
      const int from_row = row + 1 - u, from_column = column + c;
      const bool inside = from_row >= 0 && from_row < height && from_column >= 0 && from_column < width;
      const Pack<acc, 2> known = load_vec_if<2>(unit + 2 * (int64_t(from_row) * width + from_column), inside);
      COTNET_UNROLL
      for (int v = 0; v < 3; ++v) {
        const int i = c + v - 1;
        if (i >= 0 && i < kTileColumns) w[u * 3 + v][i] = exponential(w[u * 3 + v][i] - known.at[0]) * known.at[1];
      }
    }
  }
}

// ---- columns in shared memory

// Four neighbouring columns from shared memory, kVector of them in one access.
template <int kVector, class scalar_t>
COTNET_DEVICE void read_columns(const scalar_t* from, acc_t<scalar_t>* to) {
  COTNET_UNROLL
  for (int i = 0; i < kTileColumns; i += kVector) {
    const auto pack = *reinterpret_cast<const Pack<scalar_t, kVector>*>(from + i);
    if constexpr (sizeof(scalar_t) == 2 && kVector > 1) {
      uint32_t words[kVector / 2];
      std::memcpy(words, &pack, sizeof(pack));
      COTNET_UNROLL
      for (int k = 0; k < kVector; k += 2) widen_pair<scalar_t>(words[k / 2], to[i + k], to[i + k + 1]);
    } else {
      COTNET_UNROLL
      for (int k = 0; k < kVector; ++k) to[i + k] = widen(pack.at[k]);
    }
  }
}

template <int kVector, class scalar_t>
COTNET_DEVICE void write_columns(scalar_t* to, const acc_t<scalar_t>* from) {
  COTNET_UNROLL
  for (int i = 0; i < kTileColumns; i += kVector) {
    Pack<scalar_t, kVector> pack;
    COTNET_UNROLL
    for (int k = 0; k < kVector; ++k) pack.at[k] = narrow<scalar_t>(from[i + k]);
    *reinterpret_cast<Pack<scalar_t, kVector>*>(to + i) = pack;
  }
}

// ---- the tile of a block

// a / b of numbers up to kTileThreads, exact: from the next whole number (a + 0.5) / b is 0.5 / b away, and rounded by less.
COTNET_DEVICE int quotient(int a, float one_by_b) { return int((float(a) + 0.5f) * one_by_b); }

// kMirrored: weights are needed wherever x is.
template <class scalar_t, bool kMirrored>
struct TilePlace {
  int64_t image, first_channel;  // of the channels of the first plane
  int64_t weight_channel;        // of the first plane
  int planes;                    // of this block: the last may have fewer
  int first_row, rows;           // that it computes
  int first_loaded, loaded;      // rows of x in the tile
  int w_first;                   // first row of the weights in the tile
  // Elements of the arrays before the tile, as far as their place within 16 bytes goes, and from one channel or tap on.
  unsigned x_start, x_step, w_start, w_step;

  COTNET_DEVICE TilePlace(const AggregationProblem& p, const Tile& tile) {
    const unsigned weight_channels = unsigned(p.weight_channels), plane_groups = unsigned(tile.plane_groups);
    unsigned rest = blockIdx.x, strip = 0, chunk = 0;
    if (tile.strips > 1) {  // divisions take a good part of a block's instructions
      strip = rest % unsigned(tile.strips);
      rest /= unsigned(tile.strips);
    }
    const unsigned group = rest % plane_groups * unsigned(tile.planes);
    rest /= plane_groups;
    if (tile.chunks > 1) {
      chunk = rest % unsigned(tile.chunks);
      rest /= unsigned(tile.chunks);
    }
    weight_channel = group;
    first_channel = int64_t(chunk) * tile.channels * p.weight_channels + group;
    image = rest;
    planes = weight_channels - group < unsigned(tile.planes) ? int(weight_channels - group) : tile.planes;
    const int height = int(p.rows.out);
    first_row = int(strip) * tile.rows;
    rows = height - first_row < tile.rows ? height - first_row : tile.rows;
    first_loaded = first_row > 0 ? first_row - 1 : 0;
    loaded = (first_row + rows < height ? first_row + rows + 1 : height) - first_loaded;
    w_first = kMirrored ? first_loaded : first_row;
    x_start = unsigned(channel(p, 0));
    x_step = unsigned(p.weight_channels * p.in_plane());
    w_start = unsigned(tap(p, 0));
    w_step = unsigned(p.out_plane());
  }
  // Element of the first loaded row of channel j, and of tap t.
  COTNET_DEVICE int64_t channel(const AggregationProblem& p, int j) const {
    return (image * p.channels + first_channel + j * p.weight_channels) * p.in_plane() + first_loaded * p.cols.out;
  }
  COTNET_DEVICE int64_t tap(const AggregationProblem& p, int t) const {
    return ((image * p.weight_channels + weight_channel) * 9 + t) * p.out_plane() + w_first * p.cols.out;
  }
  // Where the first of them are in the tile; the others follow at the distances of the tile. `skipped`: of a second map without
  // the rows around, which begins so many elements later.
  COTNET_DEVICE int x_place(int skipped = 0) const { return place_in_chunk<scalar_t>(x_start + unsigned(skipped)); }
  COTNET_DEVICE int w_place() const { return place_in_chunk<scalar_t>(w_start); }
  // The same in tiles whose distances are whole chunks.
  COTNET_DEVICE int channel_offset(const Tile& tile, int j) const {
    return j * tile.x_stride + place_in_chunk<scalar_t>(x_start + unsigned(j) * x_step);
  }
  COTNET_DEVICE int weight_offset(const Tile& tile, int t, int of_plane, int plane) const {
    if (tile.strips > 1) return t * tile.w_stride + place_in_chunk<scalar_t>(w_start + unsigned(t) * w_step);
    return (of_plane * 9 + t) * plane + place_in_chunk<scalar_t>(w_start);
  }
  // On to the next channels that share their weights.
  COTNET_DEVICE void next_channels(const AggregationProblem& p, int channels = kTileChannels) {
    first_channel += channels * p.weight_channels;
    x_start += unsigned(channels) * x_step;
  }

  // body(tap, elements, thread, threads) for each run of weights and the threads that share it: one run for all planes, or
  // one for each tap of a strip.
  template <class Body>
  COTNET_DEVICE void each_weight_run(const AggregationProblem& p, const Tile& tile, int thread, int threads,
                                     const Body& body) const {
    const int width = int(p.cols.out);
    if (tile.strips == 1) return body(0, 9 * planes * int(p.out_plane()), thread, threads);
    for (int t = thread / 32; t < 9; t += threads / 32) body(t, (kMirrored ? loaded : rows) * width, thread % 32, 32);
  }
  COTNET_DEVICE int weight_runs(const Tile& tile) const { return tile.strips == 1 ? 1 : 9; }
  COTNET_DEVICE void load_weights(const AggregationProblem& p, const Tile& tile, scalar_t* to, const scalar_t* raw, int thread,
                                  int threads) const {
    each_weight_run(p, tile, thread, threads, [&](int t, int elements, int i, int count) {
      load_run(to + weight_offset(tile, t, 0, 0), raw, tap(p, t), elements, i, count);
    });
  }
  COTNET_DEVICE void load_weights(const TileCopies<scalar_t>& copies, const AggregationProblem& p, const Tile& tile,
                                  scalar_t* to, const scalar_t* raw, int thread, int threads) const {
    each_weight_run(p, tile, thread, threads, [&](int t, int elements, int i, int count) {
      copies.load(to + w_place() + t * tile.w_stride, raw, tap(p, t), elements, i, count);
    });
  }
  COTNET_DEVICE void store_weights(const TileCopies<scalar_t>& copies, const AggregationProblem& p, const Tile& tile,
                                   scalar_t* to, const scalar_t* from, int thread, int threads) const {
    each_weight_run(p, tile, thread, threads, [&](int t, int elements, int i, int count) {
      copies.store(to, from + w_place() + t * tile.w_stride, tap(p, t), elements, i, count);
    });
  }
};

// kSharers: channels of a tile. kMirrored: the gradient of the input, from x = grad_y to y = grad_x.
template <class scalar_t, class Weights, int kSharers, int kVector, bool kMirrored>
COTNET_KERNEL(kTileThreads, 2)
aggregation_tile_kernel(const AggregationProblem p, const Tile tile, const Weights weights,
                        const scalar_t* raw /* [N, Cw, 9, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                        scalar_t* y /* [N, C, H, W] */) {
  using acc = acc_t<scalar_t>;
  COTNET_SHARED_DYNAMIC(memory);
  // Before the first element is room for the barrier of the copies and the column before it, which is read and not used.
  scalar_t* const x_tile = reinterpret_cast<scalar_t*>(memory) + 16 / sizeof(scalar_t);  // [kSharers, planes, rows, W]
  scalar_t* const w_tile = x_tile + tile.w_start;                                       // [planes, 9, rows, W]
  const int width = int(p.cols.out), height = int(p.rows.out), plane = height * width;
  const int threads = int(blockDim.x), thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const TilePlace<scalar_t, kMirrored> at(p, tile);
  const bool strips = tile.strips > 1;
  scalar_t* const x_first = x_tile + at.x_place();  // of the first channel

  TileCopies<scalar_t> copies(tile.bulk, memory, kSharers + at.weight_runs(tile));
  at.load_weights(copies, p, tile, w_tile, raw, thread, threads);
  for (int j = warp; j < kSharers; j += threads / 32) {
    const int elements = strips ? at.loaded * width : at.planes * plane;
    copies.load(x_first + j * tile.x_stride, x, at.channel(p, j), elements, lane, 32);
  }
  copies.wait();

  // Four columns from `column` of row `row` of one plane; threads beyond the last item have nothing to compute. The last
  // four columns of a row end with it and may overlap the four before: both threads compute and write the same bits.
  const int line = quotient(thread, tile.per_segment), segment = thread - line * tile.segments;
  const int of_plane = quotient(line, tile.per_row), row = at.first_row + line - of_plane * tile.rows;
  const int column = segment * kTileColumns < width - kTileColumns ? segment * kTileColumns : width - kTileColumns;
  const bool busy = of_plane < at.planes && row < height;
  const bool first_column = column == 0, last_column = column == width - kTileColumns;
  acc sums[kSharers][kTileColumns] = {};
  if (busy) {
    acc w[9][kTileColumns];
    const scalar_t* const w_first = w_tile + at.w_place() + of_plane * 9 * plane + column;
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      // In the mirrored sum tap t of a position comes from where tap t leads to it. Rows outside are not summed.
      const int down = kMirrored ? 1 - t / 3 : 0, right = kMirrored ? 1 - t % 3 : 0;
      const int from_row = row + down >= 0 && row + down < height ? row + down : row;
      const scalar_t* const from = w_first + t * tile.w_stride + (from_row - at.w_first) * width;
      if (right == 0) read_columns<kVector>(from, w[t]);
      else read_columns<1>(from + right, w[t]);
    }
    const WeightPlace place{at.image, at.weight_channel + of_plane, p.weight_channels, int64_t(row) * width + column, plane, 9};
    if constexpr (kMirrored) transform_mirrored(weights, place, row, column, height, width, w);
    else transform(weights, place, w);
    if constexpr (kMirrored) {  // no weight comes from outside of the map
      COTNET_UNROLL
      for (int t = 0; t < 9; t += 3) {
        w[t][kTileColumns - 1] = last_column ? acc(0) : w[t][kTileColumns - 1];
        w[t + 2][0] = first_column ? acc(0) : w[t + 2][0];
      }
    }
    COTNET_UNROLL
    for (int u = 0; u < 3; ++u) {
      const int source = row + u - 1;
      if (source < 0 || source >= height) continue;
      const scalar_t* from = x_first + of_plane * plane + (source - at.first_loaded) * width + column;
      COTNET_UNROLL
      for (int j = 0; j < kSharers; ++j, from += tile.x_stride) {
        acc values[kTileColumns + 2];  // columns column - 1 to column + 4, zero outside of the map
        values[0] = first_column ? acc(0) : widen(from[-1]);
        read_columns<kVector>(from, values + 1);
        values[kTileColumns + 1] = last_column ? acc(0) : widen(from[kTileColumns]);
        COTNET_UNROLL
        for (int v = 0; v < 3; ++v) {
          const int t = kMirrored ? 8 - (u * 3 + v) : u * 3 + v;
          COTNET_UNROLL
          for (int i = 0; i < kTileColumns; ++i) sums[j][i] = fma(w[t][i], values[i + v], sums[j][i]);
        }
      }
    }
  }
  sync_block();

  // y takes the place of x in the tile.
  if (busy) {
    scalar_t* const to = x_first + of_plane * plane + (row - at.first_loaded) * width + column;
    COTNET_UNROLL
    for (int j = 0; j < kSharers; ++j) write_columns<kVector>(to + j * tile.x_stride, sums[j]);
  }
  copies.ready_to_store();
  for (int j = warp; j < kSharers; j += threads / 32) {
    const int skipped = (at.first_row - at.first_loaded) * width, elements = strips ? at.rows * width : at.planes * plane;
    copies.store(y, x_first + j * tile.x_stride + skipped, at.channel(p, j) + skipped, elements, lane, 32);
  }
  copies.finish();
}

// True when a tile kernel was launched. raw: the weights before their transformation.
template <bool kMirrored, class scalar_t, class Weights>
bool try_aggregation_tile(const AggregationProblem& p, const Weights& weights, const scalar_t* raw, const scalar_t* x,
                          scalar_t* y, const DeviceNumbers& numbers, Stream stream) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = alignment_of(raw) == 16 && alignment_of(x) == 16 && alignment_of(y) == 16;
    const Tile tile = choose_aggregation_tile(p, sizeof(scalar_t), aligned, {true, kMirrored, false}, numbers);
    if (!tile.possible()) return false;
    const auto launch = [&](auto* kernel) { launch_kernel(kernel, tile.launch, stream, p, tile, weights, raw, x, y); };
    if (tile.channels == 2) launch(&aggregation_tile_kernel<scalar_t, Weights, 2, 1, kMirrored>);
    else if (tile.channels == 4) launch(&aggregation_tile_kernel<scalar_t, Weights, 4, 1, kMirrored>);
    else if (tile.vector == 4) launch(&aggregation_tile_kernel<scalar_t, Weights, 8, 4, kMirrored>);
    else if (tile.vector == 2) launch(&aggregation_tile_kernel<scalar_t, Weights, 8, 2, kMirrored>);
    else launch(&aggregation_tile_kernel<scalar_t, Weights, 8, 1, kMirrored>);
    return true;
  }
}

}  // namespace cotnet
