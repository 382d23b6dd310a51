// When an aggregation of 3 x 3 taps is computed from tiles in shared memory, and how large they are.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "core/window.h"
#include "cuda/launch.h"

namespace cotnet {

// Most channels of a tile that share a weight channel: weights are read and widened once for 8. Where fewer share one, or a
// number that is no multiple, a tile has 4 or 2: registers and shared memory that are not taken let more blocks load at a time.
constexpr int kTileChannels = 8;
// Neighbouring columns of a thread: 36 weights and 32 sums are what fits into the registers of a thread.
constexpr int kTileColumns = 4;
// Largest block: one thread for each four columns of each row of a tile.
constexpr int kTileThreads = 256;

// Whether tiles come and go by bulk copies (sm_90) where all their runs are whole chunks of 16 bytes, rather than by copies of
// 16 bytes. A run then takes one thread's instructions, not address arithmetic of all threads: 17 to 19 percent of those of
// the kernel. Against it speaks that runs of small maps begin at odd multiples of 16 bytes, where CUB prefers 128 on Hopper:
// a benchmark with `false` here says what that costs.
constexpr bool kTileBulk = true;

// A block owns `rows` rows of the planes of `planes` consecutive weight channels, for `channels` channels of each. Several
// planes only when it has all rows: they follow each other in memory, and so planes of 98 bytes move in runs of 784.
struct Tile {
  int planes = 0;  // 0: not possible
  int rows = 0;
  int strips = 0;    // of rows of a plane
  int plane_groups = 0;  // of `planes` weight channels
  int channels = 0;      // that share a weight: kTileChannels, 4 or 2
  int chunks = 0;        // of as many
  int segments = 0;  // of kTileColumns in a row, the last may overlap the one before
  int x_stride = 0;  // elements of shared memory from one channel to the next
  int second_stride = 0;  // the same of the second map
  int w_stride = 0;  // the same from one tap to the next when there are several strips
  int vector = 1;    // columns that are aligned together in every row
  bool bulk = false;  // runs move whole
  Launch launch;

  bool possible() const { return planes > 0; }
};

// What a kernel keeps in its tile beside the channels of one map.
struct TileNeeds {
  bool weights = true;       // of every position that it computes
  bool weight_halo = false;  // and of the rows around
  bool second_map = false;   // channels of another map, without the rows around; all channels come to one block by turns
};

namespace tile {

// Elements with room for the place of a run within 16 bytes, and for the column behind the last, which is read and not used.
inline int64_t room(int64_t elements, int element_bytes) {
  const int chunk = 16 / element_bytes;
  return ceil_div(elements + chunk + kTileColumns, chunk) * chunk;
}

inline int channels_of(const AggregationProblem& p) {
  for (int channels = kTileChannels; channels > 1; channels /= 2)
    if (p.sharing() % channels == 0) return channels;
  return 0;
}

inline bool allows(const AggregationProblem& p, int element_bytes) {
  const auto plain = [](const Axis& a) { return a.kernel == 3 && a.stride == 1 && a.padding == 1 && a.dilation == 1; };
  return plain(p.rows) && plain(p.cols) && !p.reflect && !p.channels_last && p.heads == 1 && p.batch > 0 &&
         channels_of(p) > 0 && element_bytes <= 4;
}

// Bytes of shared memory; fills in the strides.
inline int64_t measure(Tile& t, const AggregationProblem& p, int element_bytes, const TileNeeds& needs) {
  const int64_t halo = t.strips > 1 ? 2 : 0, width = p.cols.out;
  t.x_stride = int(room(t.planes * (t.rows + halo) * width, element_bytes));
  t.w_stride = int(room((t.rows + (needs.weight_halo ? halo : 0)) * width, element_bytes));
  const int64_t w = t.strips > 1 ? 9 * int64_t(t.w_stride) : room(9 * t.planes * t.rows * width, element_bytes);
  t.second_stride = int(room(t.planes * t.rows * width, element_bytes));
  const int64_t maps = int64_t(t.channels) * (t.x_stride + (needs.second_map ? t.second_stride : 0));
  int64_t bytes = (maps + (needs.weights ? w : 0)) * element_bytes;
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

}  // namespace tile

inline Tile choose_aggregation_tile(const AggregationProblem& p, int element_bytes, bool aligned, const TileNeeds& needs,
                                    const DeviceNumbers& numbers) {
  Tile t;
  const int64_t height = p.rows.out, width = p.cols.out, segments = ceil_div(width, kTileColumns);
  if (!aligned || !tile::allows(p, element_bytes) || width < kTileColumns || segments > kTileThreads / 2) return t;
  t.channels = tile::channels_of(p);
  t.segments = int(segments);
  // With few channels shared memory is read little beside what is loaded: element by element serves every width.
  t.vector = t.channels < kTileChannels ? 1 : width % 4 == 0 ? 4 : width % 2 == 0 ? 2 : 1;
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
  // Planes until runs are multiples of 16 bytes and three warps are busy.
  const int64_t items = t.rows * segments;
  while (t.strips == 1 && t.planes < p.weight_channels && (t.planes + 1) * items <= kTileThreads &&
         (t.planes * items < 96 || t.planes * height * width * element_bytes % 16 != 0)) {
    ++t.planes;
    if (tile::measure(t, p, element_bytes, needs) <= most_bytes) continue;
    --t.planes;
    break;
  }
  t.bulk = kTileBulk && numbers.arch >= 90 && tile::whole_chunks(t, p, element_bytes);
  t.launch.shared_bytes = unsigned(tile::measure(t, p, element_bytes, needs));
  t.launch.threads = unsigned(ceil_div(t.planes * items, 32) * 32);
  t.plane_groups = int(ceil_div(p.weight_channels, t.planes));
  t.chunks = needs.second_map ? 1 : int(p.sharing() / t.channels);
  const int64_t blocks = p.batch * t.plane_groups * t.chunks * t.strips;
  if (blocks > (int64_t(1) << 31) - 1) return Tile{};
  t.launch.grid_x = unsigned(blocks);
  return t;
}

}  // namespace cotnet
