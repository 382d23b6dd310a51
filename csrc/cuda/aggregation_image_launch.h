// When a 3 x 3 aggregation of channels_last maps is computed from rows of pixels in shared memory, and what a block owns.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "core/window.h"
#include "cuda/launch.h"

namespace cotnet {

// Weight channels of a thread: nine weights of each are what it keeps in registers, and 36 fit beside all the rest.
constexpr int kImageQuad = 4;
// Threads of a block, one for each pixel of a step and four weight channels; the backward has as many again, so that each
// computes one of the two gradients.
constexpr int kImageThreads = 128;
constexpr int kImageBackwardThreads = 256;
// Rows of a block at most, which is how many gradients of a weight a thread sums before they are summed in double.
constexpr int kImageRows = 32;
// Numbers of a weight channel that group norm needs at hand: mean, rstd, nine of gamma and of beta, two means of gradients.
constexpr int kImageTable = 22;

// How a block moves rows of a tensor to and from shared memory. The elements of a pixel are pieces as long as the slab.
struct ImageRows {
  int64_t pixel = 0;      // elements from one pixel to the next in memory
  int piece = 0;          // and from one piece to the next
  int shift = 0;          // vectors of 16 bytes of a piece, as a power of two
  int vectors = 0;        // of all pieces
  int pitch = 0, line = 0;  // elements of shared memory from one pixel to the next, and from one row to the next
  int halo = 0;           // columns around those of the block
  int step_pixels = 0, step_vectors = 0;  // from a thread's vector to its next one
};

// A block owns `slab` weight channels, with all channels that share them, of `rows` rows and `columns` columns of an image.
// It walks down the rows, `step` of them at once, while the next ones come: no row of its own is loaded twice.
struct ImageTile {
  int columns = 0;  // 0: not possible
  int rows = 0;
  int step = 0;
  int ring = 0;         // rows of a map in shared memory: of a step, the two around, those of the next step
  int weight_ring = 0;  // the same of the weights
  int slab = 0;
  int column_tiles = 0, strips = 0, slabs = 0;  // of the map, in columns, rows and weight channels
  int pass_threads = 0;  // that compute one gradient
  ImageRows map, weights;
  Launch launch;

  bool possible() const { return columns > 0; }
  COTNET_HD int parts() const { return column_tiles * strips; }  // of a map
};

// What a kernel keeps in shared memory beside its input or the incoming gradient.
struct ImageNeeds {
  bool grad_x = false, grad_w = false;  // neither: the forward
  bool softmax = false, norm = false;   // what the weights go through
  bool sums = false;                    // of the gradients, instead of them
  bool pool = false;                    // the forward: sums of the output over the map as well

  bool backward() const { return grad_x || grad_w; }
};

inline ImageNeeds image_sums_needs() {
  ImageNeeds needs;
  needs.grad_w = needs.norm = needs.sums = true;
  return needs;
}

namespace image {

inline bool allows(const AggregationProblem& p, int element_bytes) {
  const auto plain = [](const Axis& a) {
    return a.kernel == 3 && a.stride == 1 && a.padding == 1 && a.dilation == 1 && a.out < (1 << 24);
  };
  // Vectors of 16 bytes hold neighbouring weight channels of one pixel; stores of 16-bit elements join two shared channels.
  return plain(p.rows) && plain(p.cols) && !p.reflect && p.channels_last && p.heads == 1 && p.batch > 0 &&
         p.sharing() % 2 == 0 && p.sharing() <= 64 && element_bytes <= 4 && p.weight_channels * element_bytes % 16 == 0 &&
         p.weight_channels < (1 << 20);
}

// Bytes of a pixel of a map in shared memory. With a piece more than there are, those of its neighbours are in other banks.
inline int64_t map_pixel(const AggregationProblem& p, const ImageTile& t, int element_bytes) {
  return (p.sharing() + 1) * t.slab * element_bytes;
}

// A pixel of `pieces` and of `padding` more in shared memory; `run`: its pieces follow each other in memory.
inline ImageRows rows_of(const ImageTile& t, int element_bytes, int64_t pixel, int pieces, int padding, bool run,
                         int64_t piece, int halo) {
  const int of_piece = t.slab * element_bytes / 16;
  ImageRows rows;
  rows.pixel = pixel;
  rows.piece = int(piece);
  rows.shift = run ? 31 : of_piece == 4 ? 2 : of_piece - 1;
  rows.vectors = pieces * of_piece;
  rows.pitch = (pieces + padding) * t.slab;
  rows.line = (t.columns + 2 * halo) * rows.pitch;
  rows.halo = halo;
  rows.step_pixels = int(t.launch.threads) / rows.vectors;
  rows.step_vectors = int(t.launch.threads) % rows.vectors;
  return rows;
}

inline int64_t measure(ImageTile& t, const AggregationProblem& p, int element_bytes, const ImageNeeds& needs) {
  const int64_t map = map_pixel(p, t, element_bytes), weights = 9 * int64_t(t.slab) * element_bytes;
  t.ring = std::min(2 * t.step, t.rows) + 2;
  t.weight_ring = needs.backward() ? t.ring : t.ring - 2;
  const int64_t haloed = int64_t(t.ring) * (t.columns + 2), own = int64_t(t.step) * t.columns;
  int64_t bytes = needs.norm ? kImageTable * t.slab * 4 : 0;
  if (needs.pool) bytes += p.sharing() * t.pass_threads * kImageQuad * 4;
  if (!needs.backward()) return bytes + haloed * map + int64_t(t.weight_ring) * t.columns * weights;
  bytes += haloed * (2 * map + weights + (needs.softmax ? 8 * t.slab : 0));
  if (needs.sums) return std::max<int64_t>(bytes, kImageTable * t.slab * 4 + 72 * int64_t(t.pass_threads) * 4);
  return bytes + own * weights;
}

}  // namespace image

inline ImageTile choose_aggregation_image(const AggregationProblem& p, int element_bytes, bool aligned,
                                          const ImageNeeds& needs, const DeviceNumbers& numbers) {
  ImageTile t;
  if (!aligned || !image::allows(p, element_bytes)) return t;
  const int64_t height = p.rows.out, width = p.cols.out;
  // Two blocks on a multiprocessor (each costs 1 KB on its own): one computes while the other waits for memory.
  const int64_t most_bytes = numbers.shared_bytes / 2 - 1024;
  // Pieces of 32 bytes, a sector of the L2 cache.
  t.slab = p.weight_channels * element_bytes > 16 ? 32 / element_bytes : 16 / element_bytes;
  t.slabs = int(ceil_div(p.weight_channels, t.slab));
  const int quads = t.slab / kImageQuad, pixels = kImageThreads / quads;
  t.column_tiles = int(ceil_div(width, pixels));
  int columns = int(ceil_div(width, t.column_tiles));
  t.step = int(std::min<int64_t>(height, pixels / columns));
  for (;; t.step > 1 ? --t.step : columns = (columns + 1) / 2) {
    t.column_tiles = int(ceil_div(width, columns));
    // Rows of a block until four blocks come to each multiprocessor, but the two rows around stay few beside them.
    const int64_t others = p.batch * t.slabs * t.column_tiles, wanted = ceil_div(4 * int64_t(numbers.sm_count), others);
    const int64_t least = std::max<int64_t>(7, 2 * t.step);
    t.strips = int(std::max(ceil_div(height, kImageRows), std::min(wanted, std::max<int64_t>(1, height / least))));
    t.rows = int(ceil_div(height, t.strips));
    t.strips = int(ceil_div(height, t.rows));
    t.columns = columns;
    t.step = std::min(t.step, t.rows);
    t.pass_threads = int(ceil_div(t.step * columns * quads, 32) * 32);
    t.launch.shared_bytes = unsigned(image::measure(t, p, element_bytes, needs));
    if (t.launch.shared_bytes <= most_bytes) break;
    if (t.step == 1 && columns == 1) return ImageTile{};
  }
  const int64_t blocks = p.batch * t.slabs * t.column_tiles * t.strips;
  if (blocks > (int64_t(1) << 31) - 1) return ImageTile{};
  t.launch.threads = unsigned(t.pass_threads * (needs.grad_x && needs.grad_w ? 2 : 1));
  t.launch.grid_x = unsigned(blocks);
  // A map [N, H, W, sharing, Cw], and weights [N, H, W, 9, Cw], or [N, H, W, Cw, 9], where a slab is one run.
  t.map = image::rows_of(t, element_bytes, p.channels, int(p.sharing()), 1, false, p.weight_channels, 1);
  const int halo = needs.backward() ? 1 : 0;
  t.weights = image::rows_of(t, element_bytes, 9 * p.weight_channels, 9, 0, !p.tap_major, p.weight_channels, halo);
  return t;
}

}  // namespace cotnet
