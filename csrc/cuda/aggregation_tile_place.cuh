// Where a block's tile is in the arrays, where its parts are in shared memory, and columns of it.
#pragma once

#include "cuda/aggregation_tile_copies.cuh"
#include "cuda/aggregation_tile_launch.h"

namespace cotnet {

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

// kMirrored: weights are needed wherever x is. kSize: rows and columns of a window.
template <class scalar_t, bool kMirrored, int kSize = 3>
struct TilePlace {
  static constexpr int kTaps = kSize * kSize, kHalo = kSize / 2;
  int64_t image, first_channel;  // of the channels of the first plane
  int64_t weight_channel;        // of the first plane
  int planes;                    // of this block: the last may have fewer
  int first_row, rows;           // that it computes
  int first_loaded, loaded;      // rows of x in the tile
  int w_first;                   // first row of the weights in the tile
  // Elements of the arrays before the tile, as far as their place within 16 bytes goes, and from one channel on.
  unsigned x_start, x_step, w_start;

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
    first_loaded = first_row > kHalo ? first_row - kHalo : 0;
    loaded = (first_row + rows + kHalo < height ? first_row + rows + kHalo : height) - first_loaded;
    w_first = kMirrored ? first_loaded : first_row;
    x_start = unsigned(channel(p, 0));
    x_step = unsigned(p.weight_channels * p.in_plane());
    w_start = unsigned(tap(p, 0));
  }
  // Element of the first loaded row of channel j, and of tap t.
  COTNET_DEVICE int64_t channel(const AggregationProblem& p, int j) const {
    return (image * p.channels + first_channel + j * p.weight_channels) * p.in_plane() + first_loaded * p.cols.out;
  }
  COTNET_DEVICE int64_t tap(const AggregationProblem& p, int t) const {
    return ((image * p.weight_channels + weight_channel) * kTaps + t) * p.out_plane() + w_first * p.cols.out;
  }
  // Where the first of them are in the tile; the others follow at the distances of the tile. `skipped`: of a second map
  // without the rows around, which begins so many elements later.
  COTNET_DEVICE int x_place(int skipped = 0) const { return place_in_chunk<scalar_t>(x_start + unsigned(skipped)); }
  COTNET_DEVICE int w_place() const { return place_in_chunk<scalar_t>(w_start); }
  // On to the next channels that share their weights.
  COTNET_DEVICE void next_channels(const AggregationProblem& p, int channels) {
    first_channel += channels * p.weight_channels;
    x_start += unsigned(channels) * x_step;
  }

  // body(tap, elements, thread, threads) for each run of weights and the threads that share it: one run for all planes, or
  // one for each tap of a strip.
  template <class Body>
  COTNET_DEVICE void each_weight_run(const AggregationProblem& p, const Tile& tile, int thread, int threads,
                                     const Body& body) const {
    const int width = int(p.cols.out);
    if (tile.strips == 1) return body(0, kTaps * planes * int(p.out_plane()), thread, threads);
    for (int t = thread / 32; t < kTaps; t += threads / 32) body(t, (kMirrored ? loaded : rows) * width, thread % 32, 32);
  }
  COTNET_DEVICE int weight_runs(const Tile& tile) const { return tile.strips == 1 ? 1 : kTaps; }
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

}  // namespace cotnet
