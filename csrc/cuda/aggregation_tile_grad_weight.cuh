// The gradient of the weights of 3 x 3 aggregations from tiles in shared memory (5 x 5 and 7 x 7:
// aggregation_tile_grad_weight_large.cuh): grad_w[t][q] is the sum over the channels
// that share the weight of grad_y[q] * x[q + d_t]. A thread owns four columns of one row of one weight channel: 36 sums, to
// which the channels come eight, four or two at a time. What becomes of the sums is decided by a sink, which may ask for the
// weights.
#pragma once

#include "cuda/aggregation_tile_grad_weight_large.cuh"

namespace cotnet {

template <class scalar_t, class Sink, int kSharers, int kVector>
COTNET_KERNEL(kTileThreads, 2)
aggregation_tile_grad_weight_kernel(const AggregationProblem p, const Tile tile, const Sink sink,
                                    const scalar_t* raw /* [N, Cw, 9, H, W], the stored weights */,
                                    const scalar_t* grad_y /* [N, C, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                                    scalar_t* grad_w /* [N, Cw, 9, H, W] */) {
  using acc = acc_t<scalar_t>;
  COTNET_SHARED_DYNAMIC(memory);
  scalar_t* const x_tile = reinterpret_cast<scalar_t*>(memory) + 16 / sizeof(scalar_t);  // [kSharers, planes, rows, W]
  scalar_t* const g_tile = x_tile + tile.second_start;                                  // [kSharers, planes, rows, W]
  scalar_t* const w_tile = x_tile + tile.w_start;                                       // [planes, 9, rows, W]
  [[maybe_unused]] acc* const parts = reinterpret_cast<acc*>(memory);  // [18, busy threads]
  const int width = int(p.cols.out), height = int(p.rows.out), plane = height * width;
  const int threads = int(blockDim.x), thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  TilePlace<scalar_t, false> at(p, tile);
  const bool strips = tile.strips > 1;
  const int skipped = (at.first_row - at.first_loaded) * width, computed = strips ? at.rows * width : at.planes * plane;

  TileCopies<scalar_t> copies(tile.bulk, memory, 2 * kSharers + (Sink::kNeedsWeights ? at.weight_runs(tile) : 0));
  if (Sink::kNeedsWeights) at.load_weights(copies, p, tile, w_tile, raw, thread, threads);
  const int line = quotient(thread, tile.per_segment), segment = thread - line * tile.segments;
  const int of_plane = quotient(line, tile.per_row), row = at.first_row + line - of_plane * tile.rows;
  const int column = segment * kTileColumns < width - kTileColumns ? segment * kTileColumns : width - kTileColumns;
  const bool busy = of_plane < at.planes && row < height;
  const bool first_column = column == 0, last_column = column == width - kTileColumns;
  const int offset = (row - at.first_row) * width + column;  // within the computed rows
  acc sums[9][kTileColumns] = {};
  const int chunks = int(p.sharing() / kSharers);
  for (int chunk = 0; chunk < chunks; ++chunk, at.next_channels(p, kSharers)) {
    if (chunk > 0) sync_block();  // all have read the channels before
    if (Sink::kNeedsWeights && chunk > 0)
      at.each_weight_run(p, tile, thread, threads, [&](int, int, int i, int) { copies.load_nothing(i); });
    scalar_t* const x_first = x_tile + at.x_place();  // of the first channel
    scalar_t* const g_first = g_tile + at.x_place(skipped);
    for (int j = warp; j < kSharers; j += threads / 32) {
      const int64_t begin = at.channel(p, j);
      copies.load(x_first + j * tile.x_stride, x, begin, strips ? at.loaded * width : computed, lane, 32);
      copies.load(g_first + j * tile.second_stride, grad_y, begin + skipped, computed, lane, 32);
    }
    copies.wait();
    if (!busy) continue;
    COTNET_UNROLL_BY(4)  // all eight at once need more registers for addresses than there are
    for (int j = 0; j < kSharers; ++j) {
      acc grads[kTileColumns];
      read_columns<kVector>(g_first + j * tile.second_stride + of_plane * plane + offset, grads);
      COTNET_UNROLL
      for (int u = 0; u < 3; ++u) {
        const int source = row + u - 1;
        if (source < 0 || source >= height) continue;
        const scalar_t* const from =
            x_first + j * tile.x_stride + of_plane * plane + (source - at.first_loaded) * width + column;
        acc values[kTileColumns + 2];  // columns column - 1 to column + 4, zero outside of the map
        values[0] = first_column ? acc(0) : widen(from[-1]);
        read_columns<kVector>(from, values + 1);
        values[kTileColumns + 1] = last_column ? acc(0) : widen(from[kTileColumns]);
        COTNET_UNROLL
        for (int v = 0; v < 3; ++v) {
          COTNET_UNROLL
          for (int i = 0; i < kTileColumns; ++i) sums[u * 3 + v][i] = fma(grads[i], values[i + v], sums[u * 3 + v][i]);
        }
      }
    }
  }
  acc w[9][kTileColumns];
  if (Sink::kNeedsWeights && busy) {
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t)
      read_columns<kVector>(w_tile + at.w_place() + of_plane * 9 * plane + t * tile.w_stride + offset, w[t]);
  }
  if (Sink::kSums) sync_block();  // what is summed over threads takes the place of all that was loaded
  if (busy) {
    const int64_t position = int64_t(row) * width + column;
    const WeightPlace place{at.image, at.weight_channel + of_plane, p.weight_channels, position, plane, 9};
    const int stale = segment * kTileColumns - column;
    if constexpr (Sink::kSums) sink.add(place, w, sums, stale, parts, thread, at.planes * at.rows * tile.segments);
    else sink.finish(place, w, sums);
  }
  sync_block();
  if constexpr (Sink::kSums) {
    const int64_t unit = (at.first_row / tile.rows * p.batch + at.image) * p.weight_channels + at.weight_channel;
    sink.reduce(unit, at.planes, at.rows * tile.segments, parts, thread, threads);
    return;
  }

  // grad_w takes the place of all that was loaded, laid out as weights are.
  if (busy) {
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t)
      write_columns<kVector>(x_tile + at.w_place() + of_plane * 9 * plane + t * tile.w_stride + offset, sums[t]);
  }
  copies.ready_to_store();
  at.store_weights(copies, p, tile, grad_w, x_tile, thread, threads);
  copies.finish();
}

// True when a tile kernel was launched. raw may be null where the sink needs no weights.
template <class scalar_t, class Sink>
bool try_aggregation_tile_grad_weight(const AggregationProblem& p, const Sink& sink, const scalar_t* raw,
                                      const scalar_t* grad_y, const scalar_t* x, scalar_t* grad_w, const DeviceNumbers& numbers,
                                      Stream stream) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = (!Sink::kNeedsWeights || alignment_of(raw) == 16) && alignment_of(grad_y) == 16 &&
                         alignment_of(x) == 16 && alignment_of(grad_w) == 16;
    const Tile tile = choose_aggregation_tile(p, sizeof(scalar_t), aligned, {Sink::kNeedsWeights, false, true}, numbers);
    if (!tile.possible()) return false;
    const auto launch = [&](auto* kernel) {
      launch_kernel(kernel, tile.launch, stream, p, tile, sink, raw, grad_y, x, grad_w);
    };
    if (p.rows.kernel == 7) launch(&aggregation_tile_grad_weight_large_kernel<scalar_t, Sink, 7>);
    else if (p.rows.kernel == 5) launch(&aggregation_tile_grad_weight_large_kernel<scalar_t, Sink, 5>);
    else if (tile.channels == 2) launch(&aggregation_tile_grad_weight_kernel<scalar_t, Sink, 2, 1>);
    else if (tile.channels == 4) launch(&aggregation_tile_grad_weight_kernel<scalar_t, Sink, 4, 1>);
    else if (tile.vector == 4) launch(&aggregation_tile_grad_weight_kernel<scalar_t, Sink, 8, 4>);
    else if (tile.vector == 2) launch(&aggregation_tile_grad_weight_kernel<scalar_t, Sink, 8, 2>);
    else launch(&aggregation_tile_grad_weight_kernel<scalar_t, Sink, 8, 1>);
    return true;
  }
}

}  // namespace cotnet
