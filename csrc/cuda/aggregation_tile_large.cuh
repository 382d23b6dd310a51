// Windows of 5 x 5 and 7 x 7 in tiles. Their weights do not fit into registers: a row of taps at a time, 20 or 28 weights,
// beside the same 32 sums as for 3 x 3.
#pragma once

#include "cuda/aggregation_tap_weights.cuh"
#include "cuda/aggregation_tile_place.cuh"

namespace cotnet {

// Of a mirrored sum: softmax whose largest logit and scale a kernel before has left for each position.
template <class scalar_t>
struct TapWeights<KnownSoftmaxWeights<scalar_t>, kTileColumns> {
  using acc = acc_t<scalar_t>;
  const acc* unit;

  template <class Read>
  COTNET_DEVICE TapWeights(const KnownSoftmaxWeights<scalar_t>& weights, const WeightPlace& at, const Read&)
      : unit(weights.normalisers + 2 * at.unit() * at.plane) {}
  COTNET_DEVICE void finish(acc (&)[kTileColumns]) const {}
};

template <class Weights>
struct NeedsNormalisers {
  static constexpr bool value = false;
};
template <class scalar_t>
struct NeedsNormalisers<KnownSoftmaxWeights<scalar_t>> {
  static constexpr bool value = true;
};

// Adds to the sums of a thread all taps of its four columns. x_from, w_from: its column in the first loaded row of the first
// channel, and of the first tap.
template <int kSize, bool kMirrored, int kSharers, class scalar_t, class Weights>
COTNET_DEVICE void sum_large_window(const Tile& tile, const TilePlace<scalar_t, kMirrored, kSize>& at,
                                    const Weights& weights, const WeightPlace& place, const scalar_t* x_from,
                                    const scalar_t* w_from, int row, int column, int height, int width,
                                    acc_t<scalar_t> (&sums)[kSharers][kTileColumns]) {
  using acc = acc_t<scalar_t>;
  constexpr int kHalo = kSize / 2, kTaps = kSize * kSize, kAround = kTileColumns + 2 * kHalo;
  // Columns column - kHalo, ..., of which those of the thread are always inside of the map.
  const auto inside = [&](int i) {
    return (i >= kHalo && i < kHalo + kTileColumns) || (column + i - kHalo >= 0 && column + i - kHalo < width);
  };
  const auto read = [&](int t, acc (&w)[kTileColumns]) {
    read_columns<1>(w_from + t * tile.w_stride + (row - at.w_first) * width, w);
  };
  TapWeights<Weights, kTileColumns> source(weights, place, read);
  COTNET_UNROLL_BY(1)  // code of all rows would not fit into the instruction cache
  for (int u = 0; u < kSize; ++u) {
    const int from_row = row + u - kHalo;
    const bool row_inside = from_row >= 0 && from_row < height;
    if (kMirrored && !row_inside) continue;
    acc w[kSize][kTileColumns];
    if constexpr (kMirrored) {  // tap t of a position comes from where tap t leads to it, and none from outside of the map
      [[maybe_unused]] Pack<acc, 2> known[kAround];
      if constexpr (NeedsNormalisers<Weights>::value) {
        COTNET_UNROLL
        for (int i = 0; i < kAround; ++i)
          known[i] = load_vec_if<2>(source.unit + 2 * (int64_t(from_row) * width + column + i - kHalo), inside(i));
      }
      COTNET_UNROLL
      for (int v = 0; v < kSize; ++v) {
        const int t = kTaps - 1 - (u * kSize + v);
        const scalar_t* const from = w_from + t * tile.w_stride + (from_row - at.w_first) * width + v - kHalo;
        COTNET_UNROLL
        for (int i = 0; i < kTileColumns; ++i) {
          w[v][i] = inside(i + v) ? widen(from[i]) : acc(0);
          if constexpr (NeedsNormalisers<Weights>::value)
            w[v][i] = exponential(w[v][i] - known[i + v].at[0]) * known[i + v].at[1];
        }
        if constexpr (!NeedsNormalisers<Weights>::value) source.transform(t, w[v]);
        COTNET_UNROLL
        for (int i = 0; i < kTileColumns; ++i) w[v][i] = inside(i + v) ? w[v][i] : acc(0);
      }
    } else {
      COTNET_UNROLL
      for (int v = 0; v < kSize; ++v) {
        read(u * kSize + v, w[v]);
        source.transform(u * kSize + v, w[v]);
      }
      if (!row_inside) continue;
    }
    const scalar_t* from = x_from + (from_row - at.first_loaded) * width;
    COTNET_UNROLL
    for (int j = 0; j < kSharers; ++j, from += tile.x_stride) {
      acc values[kAround];
      COTNET_UNROLL
      for (int i = 0; i < kAround; ++i) values[i] = inside(i) ? widen(from[i - kHalo]) : acc(0);
      COTNET_UNROLL
      for (int v = 0; v < kSize; ++v) {
        COTNET_UNROLL
        for (int i = 0; i < kTileColumns; ++i) sums[j][i] = fma(w[v][i], values[i + v], sums[j][i]);
      }
    }
  }
  COTNET_UNROLL
  for (int j = 0; j < kSharers; ++j) source.finish(sums[j]);
}

}  // namespace cotnet
