// When an aggregation of 3 x 3 taps (or 5 x 5, 7 x 7) is computed from tiles in shared memory, and how large they are.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "core/window.h"
#include "cuda/launch.h"

namespace cotnet {

// Most channels of a tile that share a weight channel: weights are read and widened once for 8. Where fewer share one, or a
// number that is no multiple, a tile has 4 or 2: what that leaves of registers and shared memory lets more blocks load.
constexpr int kTileChannels = 8;
// Neighbouring columns of a thread: 36 weights and 32 sums are what fits into the registers of a thread.
constexpr int kTileColumns = 4;
// Largest block: one thread for each four columns of each row of a tile.
constexpr int kTileThreads = 256;

// Whether tiles come and go by bulk copies (sm_90) where all their runs are whole chunks of 16 bytes, rather than by copies
// of 16 bytes. A run then takes one thread's instructions, not address arithmetic of all threads. Against it speaks that
// runs of small maps begin at odd multiples of 16 bytes, where CUB prefers 128 on Hopper: not measured. With `false` here,
// or for a device of arch 80, the same kernels copy 16 bytes at a time, for a benchmark to compare.
constexpr bool kTileBulk = true;

// A block owns `rows` rows of the planes of `planes` consecutive weight channels, for `channels` channels of each. Several
// planes only when it has all rows: they follow each other in memory, and so planes of 98 bytes move in runs of 784.
struct Tile {
  int planes = 0;  // 0: not possible
  int rows = 0;
  int strips = 0;        // of rows of a plane
  int plane_groups = 0;  // of `planes` weight channels
  int channels = 0;      // that share a weight: kTileChannels, 4 or 2; or all of them
  int chunks = 0;        // of as many
  int segments = 0;      // of kTileColumns in a row, the last may overlap the one before
  // Elements of shared memory from one channel to the next, of the second map too, and from one tap to the next; and before
  // the second map and the weights.
  int x_stride = 0, second_stride = 0, w_stride = 0;
  int second_start = 0, w_start = 0;
  int parts_start = 0;  // bytes of shared memory before sums of threads, in the gradient of the weights of large windows
  float per_segment = 0, per_row = 0;  // 1/segments, 1/rows
  int vector = 1;     // columns that are aligned together in every row
  bool bulk = false;  // runs move whole
  Launch launch;

  bool possible() const { return planes > 0; }
};

// What a kernel keeps in its tile beside the channels of one map.
struct TileNeeds {
  bool weights = true;       // of every position that it computes
  bool weight_halo = false;  // and of the rows around
  bool second_map = false;   // channels of another map, without the rows around; all channels come to one block by turns
  bool pooled_map = false;   // of one that is summed with the output
};

// The gradient of the weights of large windows: bytes of shared memory before the tile, and most channels that share a
// weight, which come all at once.
constexpr int kLargeHead = 32;
constexpr int kLargeSharing = 64;

namespace tile {

// Elements with room for the place of a run within 16 bytes, and for the columns behind the last, which may be read and not
// used.
inline int64_t room(int64_t elements, int element_bytes) {
  const int chunk = 16 / element_bytes;
  return ceil_div(elements + chunk + kTileColumns, chunk) * chunk;
}

// The distance in the tile of runs that begin `step` elements from each other in memory: the same within 16 bytes, so that
// all runs keep their places within 16 bytes.
inline int64_t distance(int64_t elements, int64_t step, int element_bytes) {
  return room(elements, element_bytes) + step % (16 / element_bytes);
}
inline int64_t whole(int64_t elements, int element_bytes) {
  const int chunk = 16 / element_bytes;
  return ceil_div(elements, chunk) * chunk;
}

inline int channels_of(const AggregationProblem& p) {
  for (int channels = kTileChannels; channels > 1; channels /= 2)
    if (p.sharing() % channels == 0) return channels;
  return 0;
}

// size: rows and columns of the window.
inline bool allows_window(const AggregationProblem& p, int element_bytes, int size) {
  const auto plain = [size](const Axis& a) {
    return a.kernel == size && a.stride == 1 && a.padding == size / 2 && a.dilation == 1;
  };
  return plain(p.rows) && plain(p.cols) && !p.reflect && !p.channels_last && p.heads == 1 && p.batch > 0 &&
         element_bytes <= 4;
}
inline bool allows(const AggregationProblem& p, int element_bytes) {
  return allows_window(p, element_bytes, 3) && channels_of(p) > 0;
}

// Larger windows, where eight channels share a weight: one kernel for each size, dtype and kind of weights is what rare
// windows are worth. The gradient of the weights has one for any number of channels.
inline bool allows_large(const AggregationProblem& p, int element_bytes, const TileNeeds& needs) {
  const bool large = allows_window(p, element_bytes, 5) || allows_window(p, element_bytes, 7);
  return large && (needs.second_map ? p.sharing() <= kLargeSharing : channels_of(p) == kTileChannels);
}

// Bytes of shared memory; fills in where its parts are.
inline int64_t measure(Tile& t, const AggregationProblem& p, int element_bytes, const TileNeeds& needs) {
  const int64_t halo = t.strips > 1 ? p.rows.kernel - 1 : 0, width = p.cols.out;
  const int64_t plane = p.out_plane(), step = p.weight_channels * plane;
  t.x_stride = int(distance(t.planes * (t.rows + halo) * width, step, element_bytes));
  t.second_stride = int(distance(t.planes * t.rows * width, step, element_bytes));
  t.second_start = int(whole(t.channels * int64_t(t.x_stride), element_bytes));
  t.w_start = t.second_start;
  if (needs.second_map || needs.pooled_map) t.w_start += int(whole(t.channels * int64_t(t.second_stride), element_bytes));
  const int64_t w_rows = t.rows + (needs.weight_halo ? halo : 0);
  t.w_stride = int(t.strips > 1 ? distance(w_rows * width, plane, element_bytes) : plane);
  const int64_t w = t.strips > 1 ? p.taps() * t.w_stride : room(p.taps() * t.planes * plane, element_bytes);
  if (needs.second_map && p.rows.kernel > 3) {
    // The gradient has a place of its own, that of the weights; and each thread may have two sums for each tap of a row.
    t.parts_start = int(kLargeHead + whole(t.w_start + w, element_bytes) * element_bytes);
    return t.parts_start + (needs.weights ? t.planes * t.rows * t.segments * 2 * p.rows.kernel * 4 : 0);
  }
  int64_t bytes = (t.w_start + (needs.weights ? w : 0)) * element_bytes;
  // The gradient of the weights, or two sums of each thread for each tap, take the place of what was loaded.
  if (needs.second_map) bytes = std::max({bytes, w * element_bytes, t.planes * t.rows * t.segments * 18 * int64_t(4)});
  return 16 + bytes;
}

// Whether all runs are whole chunks, from a multiple of 16 bytes on.
inline bool whole_chunks(const Tile& t, const AggregationProblem& p, int element_bytes) {
  const int64_t row = p.cols.out * element_bytes, plane = p.rows.out * row;
  if (t.strips > 1) return row % 16 == 0;
  return plane % 16 == 0 || (t.planes * plane % 16 == 0 && p.weight_channels % t.planes == 0);
}

// Several planes where they are small. Three warps should have work, runs be whole chunks of 16 bytes, and no more than a
// sixteenth of the lanes idle, as the kernels are as much bound by instructions as by memory; the fewest planes that do.
// measure(): bytes of shared memory of `t`.
template <class AnyTile, class Measure>
void choose_planes(AnyTile& t, const AggregationProblem& p, int element_bytes, int64_t most_bytes, const Measure& measure) {
  const int64_t items = t.rows * t.segments, plane = p.out_plane();
  int most = 1;
  for (t.planes = 2; t.strips == 1 && t.planes <= p.weight_channels && t.planes * items <= kTileThreads; ++t.planes) {
    if (measure() > most_bytes) break;
    most = t.planes;
  }
  const auto suits = [&](int64_t planes, int wishes) {
    const int64_t lanes = ceil_div(planes * items, 32) * 32;
    return planes * items >= 96 && (wishes < 1 || planes * plane * element_bytes % 16 == 0) &&
           (wishes < 2 || 16 * (lanes - planes * items) <= lanes);
  };
  t.planes = 0;
  for (int wishes = 2; wishes >= 0 && t.planes == 0; --wishes)
    for (int planes = 1; planes <= most && t.planes == 0; ++planes)
      if (suits(planes, wishes)) t.planes = planes;
  if (t.planes == 0) t.planes = most;
}

}  // namespace tile

inline Tile choose_aggregation_tile(const AggregationProblem& p, int element_bytes, bool aligned, const TileNeeds& needs,
                                    const DeviceNumbers& numbers) {
  Tile t;
  const int64_t height = p.rows.out, width = p.cols.out, segments = ceil_div(width, kTileColumns);
  if (!aligned || !(tile::allows(p, element_bytes) || tile::allows_large(p, element_bytes, needs))) return t;
  if (width < kTileColumns || segments > kTileThreads / 2) return t;
  const bool large_gradient = needs.second_map && p.rows.kernel > 3;
  t.channels = large_gradient ? int(p.sharing()) : tile::channels_of(p);
  t.segments = int(segments);
  // With few channels shared memory is read little beside what is loaded: element by element serves every width.
  t.vector = t.channels < kTileChannels || p.rows.kernel > 3 ? 1 : width % 4 == 0 ? 4 : width % 2 == 0 ? 2 : 1;
  // At most a quarter of the shared memory of a multiprocessor: several blocks load while others compute.
  const int64_t most_bytes = std::min<int64_t>(numbers.shared_bytes, std::max(numbers.shared_bytes / 4, 48 * 1024));
  const int64_t rows = std::min<int64_t>(height, kTileThreads / segments);
  t.strips = int(ceil_div(height, rows));
  for (;; ++t.strips) {
    t.rows = int(ceil_div(height, t.strips));
    t.planes = 1;
    if (tile::measure(t, p, element_bytes, needs) <= most_bytes) break;
    if (t.rows == 1) return Tile{};
  }
  t.strips = int(ceil_div(height, t.rows));
  tile::choose_planes(t, p, element_bytes, most_bytes, [&] { return tile::measure(t, p, element_bytes, needs); });
  t.bulk = kTileBulk && numbers.arch >= 90 && tile::whole_chunks(t, p, element_bytes);
  t.launch.shared_bytes = unsigned(tile::measure(t, p, element_bytes, needs));
  t.per_segment = 1 / float(t.segments);
  t.per_row = 1 / float(t.rows);
  t.launch.threads = unsigned(ceil_div(int64_t(t.planes) * t.rows * t.segments, 32) * 32);
  t.plane_groups = int(ceil_div(p.weight_channels, t.planes));
  t.chunks = needs.second_map ? 1 : int(p.sharing() / t.channels);
  const int64_t blocks = p.batch * t.plane_groups * t.chunks * t.strips;
  if (blocks > (int64_t(1) << 31) - 1) return Tile{};
  t.launch.grid_x = unsigned(blocks);
  return t;
}

}  // namespace cotnet
