// Aggregations of 3 x 3 taps, stride 1, from tiles in shared memory: NCHW maps of any size. (5 x 5 and 7 x 7: the sums of
// aggregation_tile_large.cuh.) A tile comes in runs of contiguous memory, by asynchronous copies of all of it or of 16 bytes
// each, and the output leaves the same way: rows of 14 or 28 bytes, whose ends no vector fits, are met in shared memory
// only.
//
// A thread owns four columns of one row and up to eight channels that share their weights: 36 weights and 32 sums in
// registers, each weight widened and transformed once for eight channels. The gradient of the input is the same sum with the
// taps mirrored and every weight taken from where it was applied:
//     grad_x[q] = sum over t of w[t][q - d_t] * grad_y[q - d_t]
#pragma once

#include "cuda/aggregation_tile_large.cuh"

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
COTNET_DEVICE void transform_mirrored(const KnownSoftmaxWeights<scalar_t>& weights, const WeightPlace& at, int row,
                                      int column, int height, int width, acc_t<scalar_t> (&w)[9][kTileColumns]) {
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

// ---- sums over the map, of what a tail makes of the output and of another map

template <class Tail>
COTNET_DEVICE bool adds_map_of(const Tail& tail) {
  if constexpr (Tail::kPools) return tail.map;
  else return false;
}

// Those of channel j in each plane of a tile, by one warp. y, map: rows of the first plane.
template <class scalar_t, class Place, class Tail>
COTNET_DEVICE void pool_channel(const AggregationProblem& p, const Tile& tile, const Place& at, const Tail& tail, int j,
                                const scalar_t* y, const scalar_t* map, int lane) {
  using acc = acc_t<scalar_t>;
  const int size = at.rows * int(p.cols.out);
  const int64_t channel = at.image * p.channels + at.first_channel + j * p.weight_channels;
  for (int of_plane = 0; of_plane < at.planes; ++of_plane, y += size, map += size) {
    acc sum = 0;
    for (int i = lane; i < size; i += 32) sum += widen(y[i]) + (tail.map ? widen(map[i]) : acc(0));
    for (int distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(kAllLanes, sum, distance);
    if (lane == 0) tail.write(at.first_row / tile.rows, channel + of_plane, sum);
  }
}

// ---- the kernel

// kSize: rows and columns of a window. kSharers: channels of a tile. kMirrored: the gradient of the input, from x = grad_y
// to y = grad_x.
template <class scalar_t, class Weights, int kSize, int kSharers, int kVector, bool kMirrored, class Tail>
COTNET_KERNEL(kTileThreads, 2)
aggregation_tile_kernel(const AggregationProblem p, const Tile tile, const Weights weights,
                        const scalar_t* raw /* [N, Cw, kTaps, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                        scalar_t* y /* [N, C, H, W] */, const Tail tail) {
  using acc = acc_t<scalar_t>;
  COTNET_SHARED_DYNAMIC(memory);
  // Before the first element is room for the barrier of the copies and the column before it, which is read and not used.
  scalar_t* const x_tile = reinterpret_cast<scalar_t*>(memory) + 16 / sizeof(scalar_t);  // [kSharers, planes, rows, W]
  scalar_t* const w_tile = x_tile + tile.w_start;                                       // [planes, kTaps, rows, W]
  const int width = int(p.cols.out), height = int(p.rows.out), plane = height * width;
  const int threads = int(blockDim.x), thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  constexpr int kTaps = kSize * kSize;
  const TilePlace<scalar_t, kMirrored, kSize> at(p, tile);
  const bool strips = tile.strips > 1;
  scalar_t* const x_first = x_tile + at.x_place();  // of the first channel

  const bool adds_map = adds_map_of(tail);
  TileCopies<scalar_t> copies(tile.bulk, memory, kSharers * (adds_map ? 2 : 1) + at.weight_runs(tile));
  at.load_weights(copies, p, tile, w_tile, raw, thread, threads);
  for (int j = warp; j < kSharers; j += threads / 32) {
    const int elements = strips ? at.loaded * width : at.planes * plane;
    copies.load(x_first + j * tile.x_stride, x, at.channel(p, j), elements, lane, 32);
  }
  const int skipped = (at.first_row - at.first_loaded) * width, computed = strips ? at.rows * width : at.planes * plane;
  scalar_t* const map_first = x_tile + tile.second_start + at.x_place(skipped);  // of the map that is added, if any
  if constexpr (Tail::kPools) {
    for (int j = warp; adds_map && j < kSharers; j += threads / 32)
      copies.load(map_first + j * tile.second_stride, tail.map, at.channel(p, j) + skipped, computed, lane, 32);
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
  const int64_t position = int64_t(row) * width + column;
  const WeightPlace place{at.image, at.weight_channel + of_plane, p.weight_channels, position, plane, kTaps};
  const scalar_t* const x_from = x_first + of_plane * plane + column;  // of the first loaded row
  const scalar_t* const w_from = w_tile + at.w_place() + of_plane * kTaps * plane + column;
  if constexpr (kSize > 3) {
    if (busy)
      sum_large_window<kSize, kMirrored>(tile, at, weights, place, x_from, w_from, row, column, height, width, sums);
  } else if (busy) {
    acc w[9][kTileColumns];
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      // In the mirrored sum tap t of a position comes from where tap t leads to it. Rows outside are not summed.
      const int down = kMirrored ? 1 - t / 3 : 0, right = kMirrored ? 1 - t % 3 : 0;
      const int from_row = row + down >= 0 && row + down < height ? row + down : row;
      const scalar_t* const from = w_from + t * tile.w_stride + (from_row - at.w_first) * width;
      if (right == 0) read_columns<kVector>(from, w[t]);
      else read_columns<1>(from + right, w[t]);
    }
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
      const scalar_t* from = x_from + (source - at.first_loaded) * width;
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
    for (int j = 0; j < kSharers; ++j) {
      const auto finish = tail.of(at.first_channel + of_plane + j * p.weight_channels);
      COTNET_UNROLL
      for (int i = 0; i < kTileColumns; ++i) sums[j][i] = finish(sums[j][i]);
      write_columns<kVector>(to + j * tile.x_stride, sums[j]);
    }
  }
  copies.ready_to_store();
  for (int j = warp; j < kSharers; j += threads / 32) {
    const scalar_t* const from = x_first + j * tile.x_stride + skipped;
    copies.store(y, from, at.channel(p, j) + skipped, computed, lane, 32);
    if constexpr (Tail::kPools) pool_channel(p, tile, at, tail, j, from, map_first + j * tile.second_stride, lane);
  }
  copies.finish();
}

// True when a tile kernel was launched. raw: the weights before their transformation. rest: what its tail starts from.
template <bool kMirrored, class scalar_t, class Weights, class Rest = NoTail>
bool try_aggregation_tile(const AggregationProblem& p, const Weights& weights, const scalar_t* raw, const scalar_t* x,
                          scalar_t* y, const DeviceNumbers& numbers, Stream stream, const Rest& rest = {}) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = alignment_of(raw) == 16 && alignment_of(x) == 16 && alignment_of(y) == 16 && rest.aligned();
    const TileNeeds needs{true, kMirrored, false, rest.adds_map()};
    const Tile tile = choose_aggregation_tile(p, sizeof(scalar_t), aligned, needs, numbers);
    if (!tile.possible()) return false;
    const auto tail = rest.start(tile.strips);
    using Tail = std::remove_const_t<decltype(tail)>;
    const auto launch = [&](auto* kernel) { launch_kernel(kernel, tile.launch, stream, p, tile, weights, raw, x, y, tail); };
    if (p.rows.kernel == 7) launch(&aggregation_tile_kernel<scalar_t, Weights, 7, 8, 1, kMirrored, Tail>);
    else if (p.rows.kernel == 5) launch(&aggregation_tile_kernel<scalar_t, Weights, 5, 8, 1, kMirrored, Tail>);
    else if (tile.channels == 2) launch(&aggregation_tile_kernel<scalar_t, Weights, 3, 2, 1, kMirrored, Tail>);
    else if (tile.channels == 4) launch(&aggregation_tile_kernel<scalar_t, Weights, 3, 4, 1, kMirrored, Tail>);
    else if (tile.vector == 4) launch(&aggregation_tile_kernel<scalar_t, Weights, 3, 8, 4, kMirrored, Tail>);
    else if (tile.vector == 2) launch(&aggregation_tile_kernel<scalar_t, Weights, 3, 8, 2, kMirrored, Tail>);
    else launch(&aggregation_tile_kernel<scalar_t, Weights, 3, 8, 1, kMirrored, Tail>);
    return true;
  }
}

}  // namespace cotnet
