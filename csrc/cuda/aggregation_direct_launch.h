// When an aggregation of 3 x 3 taps is computed without shared memory, each thread from its own loads.
#pragma once

#include "core/problem.h"
#include "core/window.h"
#include "cuda/aggregation_tile_launch.h"
#include "cuda/launch.h"

namespace cotnet {

// Channels of a thread that share a weight channel, as in a tile.
constexpr int kDirectChannels = 8;
// Threads of a block; three blocks on a multiprocessor, so that a thread may have 168 registers: a sum for each column and
// channel (64 of them), a row of weights (24), and the 11 vectors of a row of taps on their way (44). They are 67 KB for the
// multiprocessor, where some 48 KB keep the memory of an H200 busy; a fourth block would have had to spill.
constexpr int kDirectThreads = 128;

// A thread owns one vector of neighbouring columns, for kDirectChannels channels of one weight channel.
struct Direct {
  int row_vectors = 0;  // of a row; 0: not possible
  int chunks = 0;       // of kDirectChannels channels that share a weight
  int parts = 0;        // of a plane at most, in warps
  int64_t plane_vectors = 0;
  int64_t threads = 0;  // with work, in all blocks
  Launch launch;

  bool possible() const { return row_vectors > 0; }
};

// `columns`: of a vector. Rows must be whole vectors, so that lanes are neighbours as columns are. For maps of more
// positions than a block of tiles has: smaller ones come into shared memory whole, each row once, where this kernel asks the
// L1 cache for it three times and for the rows around its block besides.
inline Direct choose_aggregation_direct(const AggregationProblem& p, int element_bytes, int columns, bool aligned) {
  Direct d;
  const int64_t width = p.cols.out;
  if (!aligned || !tile::allows(p, element_bytes) || p.sharing() % kDirectChannels != 0 || width % columns != 0 ||
      p.out_plane() <= kTileThreads * kTileColumns || p.out_plane() >= int64_t(1) << 31)
    return d;
  d.plane_vectors = p.out_plane() / columns;
  d.chunks = int(p.sharing() / kDirectChannels);
  d.threads = p.batch * p.weight_channels * d.chunks * d.plane_vectors;
  const int64_t blocks = ceil_div(d.threads, kDirectThreads);
  if (blocks > (int64_t(1) << 31) - 1) return d;
  d.row_vectors = int(width / columns);
  // Where a plane begins within a warp: as far from the end of the warp as any may.
  d.parts = int(d.plane_vectors % 32 == 0 ? d.plane_vectors / 32 : (d.plane_vectors + 30) / 32 + 1);
  d.launch.grid_x = unsigned(blocks);
  d.launch.threads = kDirectThreads;
  return d;
}

}  // namespace cotnet
