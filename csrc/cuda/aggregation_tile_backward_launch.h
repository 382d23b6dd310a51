// When both gradients of an aggregation come from one kernel, and how large its tiles are.
#pragma once

#include <algorithm>

#include "cuda/aggregation_tile_launch.h"

namespace cotnet {

// A tile as in the kernels of one gradient, but with the rows around for x, grad_y and the weights alike. Channels that
// share a weight, any number, come to a block by turns.
struct BackwardTile : Tile {
  int turns = 0;        // of `channels` channels, the last may have fewer
  int extra_start = 0;  // bytes of shared memory before what is no tile
};

// Bytes of shared memory before the tiles: barriers, zeros, what a block knows of its place.
constexpr int kBackwardHead = 128;

// What a kernel keeps beside its maps and weights, in numbers of acc_t.
struct BackwardNeeds {
  int per_position = 0;     // of every loaded position
  int per_plane = 0;
  int per_item = 0;         // of every thread, in the place of x and grad_y once they are not needed any more
  bool whole_maps = false;  // for sums over the map that the same block uses again
};
// Largest logit and scale of each window.
constexpr BackwardNeeds softmax_backward_needs() { return {2, 0, 0, false}; }
// Scale and shift of each tap, mean and rstd; two sums for each tap.
constexpr BackwardNeeds norm_backward_needs(bool whole_maps) { return {0, 20, 18, whole_maps}; }

namespace tile {

inline bool allows_backward(const AggregationProblem& p, int element_bytes) {
  const auto plain = [](const Axis& a) { return a.kernel == 3 && a.stride == 1 && a.padding == 1 && a.dilation == 1; };
  return plain(p.rows) && plain(p.cols) && !p.reflect && !p.channels_last && p.heads == 1 && p.batch > 0 &&
         element_bytes <= 4;
}

// Bytes of shared memory; fills in where its parts are.
inline int64_t measure_backward(BackwardTile& t, const AggregationProblem& p, int element_bytes,
                                const BackwardNeeds& needs) {
  const int64_t loaded = t.strips > 1 ? t.rows + 2 : t.rows, width = p.cols.out, plane = p.out_plane();
  const int64_t positions = t.planes * loaded * width;
  t.x_stride = int(distance(positions, p.weight_channels * plane, element_bytes));
  t.second_start = int(whole(t.channels * int64_t(t.x_stride), element_bytes));
  // The last sums of a plane: 18 of 8 bytes and two of 4.
  const int64_t sums = needs.per_item ? 4 * needs.per_item * t.planes * t.rows * t.segments + 152 * t.planes : 0;
  t.w_start = int(std::max<int64_t>(2 * t.second_start, whole(ceil_div(sums, element_bytes), element_bytes)));
  t.w_stride = int(t.strips > 1 ? distance(loaded * width, plane, element_bytes) : plane);
  const int64_t w = t.strips > 1 ? 9 * int64_t(t.w_stride) : room(9 * positions, element_bytes);
  t.extra_start = int(ceil_div(kBackwardHead + (t.w_start + w) * element_bytes, 16) * 16);
  return t.extra_start + 4 * (needs.per_position * positions + needs.per_plane * t.planes);
}

}  // namespace tile

inline BackwardTile choose_aggregation_tile_backward(const AggregationProblem& p, int element_bytes, bool aligned,
                                                     const BackwardNeeds& needs, const DeviceNumbers& numbers) {
  BackwardTile t;
  const int64_t height = p.rows.out, width = p.cols.out, segments = ceil_div(width, kTileColumns);
  if (!aligned || !tile::allows_backward(p, element_bytes) || width < kTileColumns || segments > kTileThreads / 2) return t;
  t.segments = int(segments);
  t.channels = int(std::min<int64_t>(p.sharing(), kTileChannels));
  t.turns = int(ceil_div(p.sharing(), t.channels));
  t.chunks = 1;
  t.vector = width % 4 == 0 ? 4 : width % 2 == 0 ? 2 : 1;
  // A third of the shared memory of a multiprocessor, as registers allow three blocks or so: some load while others compute.
  // Half of it for what otherwise takes a second kernel, which reads all of it again.
  const int64_t share = numbers.shared_bytes / (needs.whole_maps ? 2 : 3);
  const int64_t most_bytes = std::min<int64_t>(numbers.shared_bytes, std::max<int64_t>(share, 48 * 1024));
  t.planes = 1;
  for (t.strips = int(ceil_div(height, kTileThreads / segments));; ++t.strips) {
    t.rows = int(ceil_div(height, t.strips));
    if (needs.whole_maps && t.strips > 1) return BackwardTile{};
    if (tile::measure_backward(t, p, element_bytes, needs) <= most_bytes) break;
    if (t.rows == 1) return BackwardTile{};
  }
  t.strips = int(ceil_div(height, t.rows));
  tile::choose_planes(t, p, element_bytes, most_bytes, [&] { return tile::measure_backward(t, p, element_bytes, needs); });
  t.bulk = kTileBulk && numbers.arch >= 90 && tile::whole_chunks(t, p, element_bytes);
  t.launch.shared_bytes = unsigned(tile::measure_backward(t, p, element_bytes, needs));
  t.per_segment = 1 / float(t.segments);
  t.per_row = 1 / float(t.rows);
  t.launch.threads = unsigned(ceil_div(int64_t(t.planes) * t.rows * t.segments, 32) * 32);
  t.plane_groups = int(ceil_div(p.weight_channels, t.planes));
  const int64_t blocks = p.batch * t.plane_groups * t.strips;
  if (blocks > (int64_t(1) << 31) - 1) return BackwardTile{};
  t.launch.grid_x = unsigned(blocks);
  return t;
}

}  // namespace cotnet
