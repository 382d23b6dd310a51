// Aggregations of 3 x 3 taps, stride 1, on channels_last maps of any size: a block walks down the rows of a part of an image
// while the next rows come to shared memory, by asynchronous copies of 16 bytes.
//
// A thread owns one pixel and four neighbouring weight channels: 36 weights in registers, widened and transformed once for
// all channels that share them. Weights lie in memory as [Cw, 9] of each pixel, or tap by tap as [9, Cw]; pieces of the
// weight channels of a block have 32 bytes either way, and so have those of a map.
#pragma once

#include "cuda/aggregation_image_launch.h"
#include "cuda/tails.cuh"
#include "cuda/weights.cuh"

namespace cotnet {

// Four neighbouring elements of shared memory.
template <class scalar_t>
COTNET_DEVICE void read_quad(const scalar_t* from, acc_t<scalar_t>* to) {
  const auto pack = *reinterpret_cast<const Pack<scalar_t, kImageQuad>*>(from);
  if constexpr (sizeof(scalar_t) == 2) {
    const auto words = bit_cast<Pack<uint32_t, kImageQuad / 2>>(pack);
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; i += 2) widen_pair<scalar_t>(words.at[i / 2], to[i], to[i + 1]);
  } else {
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) to[i] = pack.at[i];
  }
}
template <class scalar_t>
COTNET_DEVICE Pack<scalar_t, kImageQuad> narrow_quad(const acc_t<scalar_t>* from) {
  Pack<scalar_t, kImageQuad> pack;
  COTNET_UNROLL
  for (int i = 0; i < kImageQuad; ++i) pack.at[i] = narrow<scalar_t>(from[i]);
  return pack;
}
template <class scalar_t>
COTNET_DEVICE void write_quad(scalar_t* to, const acc_t<scalar_t>* from) {
  *reinterpret_cast<Pack<scalar_t, kImageQuad>*>(to) = narrow_quad<scalar_t>(from);
}

// Four weight channels at one pixel, from where the copies left their slab: [Cw, 9] or [9, Cw].
template <class scalar_t>
COTNET_DEVICE void read_window(const scalar_t* pixel, int quad, int slab, bool tap_major,
                               acc_t<scalar_t> (&w)[9][kImageQuad]) {
  COTNET_UNROLL
  for (int k = 0; k < 9; ++k) {
    acc_t<scalar_t> four[kImageQuad];
    read_quad(pixel + (tap_major ? k * slab + quad * kImageQuad : (quad * 9 + k) * kImageQuad), four);
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) w[k][i] = four[i];
  }
  if (tap_major) return;
  acc_t<scalar_t> all[9 * kImageQuad];
  COTNET_UNROLL
  for (int e = 0; e < 9 * kImageQuad; ++e) all[e] = w[e / kImageQuad][e % kImageQuad];
  COTNET_UNROLL
  for (int e = 0; e < 9 * kImageQuad; ++e) w[e % 9][e / 9] = all[e];
}

// ---- the part of an image that a block owns

COTNET_DEVICE int fewer(int a, int b) { return a < b ? a : b; }

struct ImagePlace {
  int64_t image;
  int channel, channels;      // weight channels: the first, and how many of the slab there are
  int first_row, rows;
  int first_column, columns;
  int part;                   // of the map
  int height, width;

  COTNET_DEVICE ImagePlace(const AggregationProblem& p, const ImageTile& tile)
      : height(int(p.rows.out)), width(int(p.cols.out)) {
    unsigned rest = blockIdx.x;
    channel = int(rest % unsigned(tile.slabs)) * tile.slab;
    rest /= unsigned(tile.slabs);
    part = int(rest % unsigned(tile.parts()));
    image = rest / unsigned(tile.parts());
    first_column = part % tile.column_tiles * tile.columns;
    first_row = part / tile.column_tiles * tile.rows;
    channels = fewer(tile.slab, int(p.weight_channels) - channel);
    columns = fewer(tile.columns, width - first_column);
    rows = fewer(tile.rows, height - first_row);
  }
};

// A place of a ring, `offset` rows behind place `base`.
COTNET_DEVICE int around(int base, int offset, int ring) {
  const int place = base + offset;
  return place < ring ? place : place - ring;
}

// A thread's share in moving rows of tensors of one shape.
template <class scalar_t>
struct ImageFeed {
  static constexpr int kVector = 16 / int(sizeof(scalar_t));
  const ImageRows& rows;
  int64_t origin;  // the block's weight channels at the first pixel of its image
  int limit;       // vectors of a piece that exist
  int first_pixel, first_vector;  // of this thread

  // `scale`: elements of a weight channel that are neighbours in memory.
  COTNET_DEVICE ImageFeed(const ImageRows& rows, const ImagePlace& at, int scale)
      : rows(rows),
        origin(at.image * at.height * at.width * rows.pixel + scale * at.channel),
        limit(scale * at.channels / kVector),
        first_pixel(int(threadIdx.x) / rows.vectors),
        first_vector(int(threadIdx.x) - first_pixel * rows.vectors) {}

  // body(pixel, element of shared memory, element of memory, whether it exists) for each of the thread's vectors of a row.
  template <class Body>
  COTNET_DEVICE void each_vector(const ImagePlace& at, int halo, const Body& body) const {
    const int mask = int((1u << rows.shift) - 1);
    COTNET_UNROLL_BY(1)
    for (int i = first_pixel, k = first_vector; i < at.columns + 2 * halo;) {
      const int vector = k & mask;
      body(i, i * rows.pitch + k * kVector, (i - halo) * rows.pixel + (k >> rows.shift) * rows.piece + vector * kVector,
           vector < limit);
      i += rows.step_pixels;
      k += rows.step_vectors;
      if (k >= rows.vectors) {
        k -= rows.vectors;
        ++i;
      }
    }
  }
  // Copies row `row` of an array to [columns + 2*halo, pitch]; zeros where the map or the weight channels end.
  COTNET_DEVICE void load(const ImagePlace& at, int row, const scalar_t* array, scalar_t* to) const {
    const bool inside = row >= 0 && row < at.height;
    const scalar_t* const pixels = array + origin + (int64_t(inside ? row : 0) * at.width + at.first_column) * rows.pixel;
    each_vector(at, rows.halo, [&](int i, int element, int64_t offset, bool there) {
      const bool ok = inside && there && unsigned(at.first_column + i - rows.halo) < unsigned(at.width);
      cp_async_16(to + element, pixels + (ok ? offset : 0), ok);
    });
  }
  // The way back: [columns, pitch], without columns around, to a row of an array.
  COTNET_DEVICE void store(const ImagePlace& at, int row, scalar_t* array, const scalar_t* from) const {
    scalar_t* const pixels = array + origin + (int64_t(row) * at.width + at.first_column) * rows.pixel;
    each_vector(at, 0, [&](int, int element, int64_t offset, bool there) {
      if (there) store_vec(pixels + offset, *reinterpret_cast<const Pack<scalar_t, kVector>*>(from + element));
    });
  }
  // Where a pixel of a row is, from the first row in shared memory on.
  COTNET_DEVICE int at(int place, int column) const { return place * rows.line + column * rows.pitch; }
};

// Sharing channels that a thread computes together: as many as make 16 bytes of four weight channels.
template <class scalar_t>
constexpr int kImageTogether = 4 / int(sizeof(scalar_t));

// Stores them, `step` elements apart. Neighbouring lanes have neighbouring weight channels: of 16-bit elements they swap
// halves, so that each stores 16 bytes. `lanes` take part.
template <class scalar_t>
COTNET_DEVICE void store_quads(scalar_t* to, int64_t step,
                               const acc_t<scalar_t> (&sums)[kImageTogether<scalar_t>][kImageQuad], unsigned lanes) {
  if constexpr (sizeof(scalar_t) == 4) {
    store_vec(to, narrow_quad<scalar_t>(sums[0]));
  } else {
    const auto first = narrow_quad<scalar_t>(sums[0]), second = narrow_quad<scalar_t>(sums[1]);
    const bool odd = threadIdx.x & 1;
    const auto one = bit_cast<Pack<uint32_t, 2>>(first), two = bit_cast<Pack<uint32_t, 2>>(second);
    Pack<uint32_t, 4> both;
    COTNET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = shuffle_xor(lanes, odd ? one.at[i] : two.at[i], 1);
      both.at[i] = odd ? other : one.at[i];
      both.at[2 + i] = odd ? two.at[i] : other;
    }
    store_vec(reinterpret_cast<uint32_t*>(odd ? to + step - kImageQuad : to), both);
  }
}

// ---- what the weights go through. Group norm has a table of its numbers in shared memory, [kImageTable, slab]:
// mean, rstd, gamma of nine taps, beta of nine taps, and for the gradients two means.

template <class Weights>
constexpr bool kIsSoftmax = false;
template <class scalar_t>
constexpr bool kIsSoftmax<SoftmaxWeights<scalar_t>> = true;
template <class Weights>
constexpr bool kIsNorm = false;
template <class scalar_t>
constexpr bool kIsNorm<NormWeights<scalar_t>> = true;

template <class Weights, class acc>
COTNET_DEVICE void fill_table(const Weights&, const AggregationProblem&, const ImagePlace&, int, const double*, acc*) {}

template <class scalar_t>
COTNET_DEVICE void fill_table(const NormWeights<scalar_t>& weights, const AggregationProblem& p, const ImagePlace& at,
                              int slab, const double* means /* [N, Cw, 2] or null */, acc_t<scalar_t>* table) {
  for (int e = int(threadIdx.x); e < kImageTable * slab; e += int(blockDim.x)) {
    const int row = e / slab, c = e - row * slab;
    acc_t<scalar_t> value = 0;
    if (c < at.channels) {
      const int64_t channel = at.channel + c, unit = at.image * p.weight_channels + channel;
      if (row == 0) value = load_wide(weights.mean + unit);
      else if (row == 1) value = load_wide(weights.rstd + unit);
      else if (row < 11) value = weights.gamma ? load_wide(weights.gamma + channel * 9 + row - 2) : 1;
      else if (row < 20) value = weights.beta ? load_wide(weights.beta + channel * 9 + row - 11) : 0;
      else if (means) value = acc_t<scalar_t>(load_vec<1>(means + 2 * unit + row - 20).at[0]);
    }
    table[e] = value;
  }
}

// From raw weights to what is summed with; `numbers` is the table from the thread's channels on.
template <class Weights, class acc>
COTNET_DEVICE void transform_window(const Weights&, const acc* numbers, int slab, acc (&w)[9][kImageQuad]) {
  if constexpr (kIsSoftmax<Weights>) {
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) {
      acc top = w[0][i], sum = 0;
      COTNET_UNROLL
      for (int t = 1; t < 9; ++t) top = w[t][i] > top ? w[t][i] : top;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) sum += w[t][i] = fast_exponential(w[t][i] - top);
      const acc scale = 1 / sum;
      COTNET_UNROLL
      for (int t = 0; t < 9; ++t) w[t][i] *= scale;
    }
  } else if constexpr (kIsNorm<Weights>) {
    acc mean[kImageQuad], rstd[kImageQuad];
    read_quad(numbers, mean);
    read_quad(numbers + slab, rstd);
    COTNET_UNROLL
    for (int t = 0; t < 9; ++t) {
      acc gamma[kImageQuad], beta[kImageQuad];
      read_quad(numbers + (2 + t) * slab, gamma);
      read_quad(numbers + (11 + t) * slab, beta);
      COTNET_UNROLL
      for (int i = 0; i < kImageQuad; ++i) w[t][i] = fma((w[t][i] - mean[i]) * rstd[i], gamma[i], beta[i]);
    }
  }
}

// Weight channels of a slab: kPiece bytes, 16 or 32, so that the compiler knows distances in shared memory, or any (0), for
// elements of 32 bits, which have fewer instructions to each byte and no registers to spare. Looked up at every use.
template <class scalar_t, int kPiece>
struct ImageSlab {
  const ImageTile& tile;
  COTNET_DEVICE operator int() const { return kPiece > 0 ? kPiece / int(sizeof(scalar_t)) : tile.slab; }
};

// ---- sums over the map, of what a tail makes of the output and of another map

// A thread's sums of each of its channels are in shared memory, as registers cannot be counted through by a loop.
template <class acc>
struct ImagePool {
  acc* own;  // [sharing, threads, kImageQuad], from the thread's on
  int step;  // from one sharing channel to the next

  COTNET_DEVICE ImagePool(acc* memory, int sharing)
      : own(memory + int(threadIdx.x) * kImageQuad), step(int(blockDim.x) * kImageQuad) {
    const acc nothing[kImageQuad] = {};
    for (int j = 0; j < sharing; ++j) write_quad(own + j * step, nothing);
  }
  template <class scalar_t>
  COTNET_DEVICE void add(int j, const acc (&sums)[kImageQuad], const Pack<scalar_t, kImageQuad>& map) const {
    acc total[kImageQuad];
    read_quad(own + j * step, total);
    COTNET_UNROLL
    for (int i = 0; i < kImageQuad; ++i) total[i] += widen(narrow<scalar_t>(sums[i])) + widen(map.at[i]);
    write_quad(own + j * step, total);
  }
  // Over the threads of the block that have the channel, in their order.
  template <class Tail>
  COTNET_DEVICE void finish(const AggregationProblem& p, const ImagePlace& at, int slab, const Tail& tail) const {
    const int threads = int(blockDim.x), quads = slab / kImageQuad, sharing = int(p.sharing());
    const acc* const memory = own - int(threadIdx.x) * kImageQuad;
    sync_block();
    for (int number = int(threadIdx.x); number < sharing * slab; number += threads) {
      const int j = number / slab, c = number - j * slab;
      double total = 0;
      for (int i = c / kImageQuad; i < threads; i += quads)
        total += double(memory[j * step + i * kImageQuad + c % kImageQuad]);
      if (c < at.channels) tail.write(at.part, at.image * p.channels + at.channel + c + j * p.weight_channels, total);
    }
  }
};

// ---- forward

template <class scalar_t, class Weights, int kPiece, class Tail>
COTNET_KERNEL(kImageThreads, 3)
aggregation_image_kernel(const AggregationProblem p, const ImageTile tile, const Weights weights,
                         const scalar_t* raw /* [N, Cw, 9, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                         scalar_t* y /* [N, C, H, W] */, const Tail tail) {
  using acc = acc_t<scalar_t>;
  constexpr int kTogether = kImageTogether<scalar_t>;
  const ImageSlab<scalar_t, kPiece> slab{tile};
  COTNET_SHARED_DYNAMIC(memory);
  const ImagePlace at(p, tile);
  acc* const table = reinterpret_cast<acc*>(memory);  // [kImageTable, slab]
  scalar_t* const x_rows = reinterpret_cast<scalar_t*>(table + (kIsNorm<Weights> ? kImageTable * slab : 0));
  const ImageFeed<scalar_t> x_feed(tile.map, at, 1);                         // [ring, columns + 2, pitch]
  const ImageFeed<scalar_t> w_feed(tile.weights, at, p.tap_major ? 1 : 9);  // [weight_ring, columns, pitch]
  scalar_t* const w_rows = x_rows + tile.ring * x_feed.rows.line;
  fill_table(weights, p, at, slab, nullptr, table);

  // A pixel `row` rows below the first of a step, and four weight channels.
  const int quads = slab / kImageQuad, thread = int(threadIdx.x), quad = thread & (quads - 1), pixel = thread / quads;
  const int row = pixel / tile.columns, column = pixel - row * tile.columns;
  const int sharing = int(p.sharing());
  const bool mine = column < at.columns && row < tile.step && quad * kImageQuad < at.channels;
  acc* const pool_memory = reinterpret_cast<acc*>(w_rows + tile.weight_ring * w_feed.rows.line);
  [[maybe_unused]] const ImagePool<acc> pool(pool_memory, Tail::kPools ? sharing : 0);

  COTNET_UNROLL_BY(1)
  for (int k = 0; k < tile.step + 2 && k < at.rows + 2; ++k)
    x_feed.load(at, at.first_row - 1 + k, x, x_rows + k * x_feed.rows.line);
  COTNET_UNROLL_BY(1)
  for (int k = 0; k < tile.step && k < at.rows; ++k)
    w_feed.load(at, at.first_row + k, raw, w_rows + k * w_feed.rows.line);
  cp_async_commit();
  int place = 0, w_place = 0;  // in the rings: of the row before the first of the step, and of the step's first weights
  for (int first = 0; first < at.rows; first += tile.step) {
    cp_async_wait<0>();
    sync_block();  // these rows have come; all have done with the rows before, which the next ones replace
    COTNET_UNROLL_BY(1)
    for (int k = tile.step; k < 2 * tile.step && first + k < at.rows; ++k) {
      x_feed.load(at, at.first_row + 1 + first + k, x, x_rows + around(place, k + 2, tile.ring) * x_feed.rows.line);
      w_feed.load(at, at.first_row + first + k, raw, w_rows + around(w_place, k, tile.weight_ring) * w_feed.rows.line);
    }
    cp_async_commit();
    const bool busy = mine && first + row < at.rows;
    const unsigned lanes = ballot(kAllLanes, busy);
    if (busy) {
      acc w[9][kImageQuad];
      read_window(w_rows + w_feed.at(around(w_place, row, tile.weight_ring), column), quad, slab, p.tap_major, w);
      transform_window(weights, table + quad * kImageQuad, slab, w);
      const scalar_t* window[3];
      COTNET_UNROLL
      for (int u = 0; u < 3; ++u) 
        window[u] = x_rows + x_feed.at(around(place, row + u, tile.ring), column) + quad * kImageQuad;
      const int64_t at_row = (at.image * at.height + at.first_row + first + row) * at.width + at.first_column + column;
      scalar_t* to = y + at_row * p.channels + at.channel + quad * kImageQuad;
      COTNET_UNROLL_BY(1)
      for (int j = 0; j < sharing; j += kTogether, to += kTogether * p.weight_channels) {
        [[maybe_unused]] Pack<scalar_t, kImageQuad> beside[kTogether] = {};  // of the map that is summed as well
        if constexpr (Tail::kPools) {
          COTNET_UNROLL
          for (int k = 0; k < kTogether; ++k)
            if (tail.map) beside[k] = load_vec<kImageQuad>(tail.map + (to - y) + k * p.weight_channels);
        }
        acc sums[kTogether][kImageQuad] = {};
        COTNET_UNROLL
        for (int t = 0; t < 9; ++t) {
          COTNET_UNROLL
          for (int k = 0; k < kTogether; ++k) {
            acc values[kImageQuad];
            read_quad(window[t / 3] + t % 3 * x_feed.rows.pitch + (j + k) * slab, values);
            COTNET_UNROLL
            for (int i = 0; i < kImageQuad; ++i) sums[k][i] = fma(w[t][i], values[i], sums[k][i]);
          }
        }
        COTNET_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          const int64_t channel = at.channel + quad * kImageQuad + (j + k) * p.weight_channels;
          COTNET_UNROLL
          for (int i = 0; i < kImageQuad; ++i) sums[k][i] = tail.of(channel + i)(sums[k][i]);
          if constexpr (Tail::kPools) pool.add(j + k, sums[k], beside[k]);
        }
        store_quads(to, p.weight_channels, sums, lanes);
      }
    }
    place = around(place, tile.step, tile.ring);
    w_place = around(w_place, tile.step, tile.weight_ring);
  }
  if constexpr (Tail::kPools) pool.finish(p, at, slab, tail);
}

// True when the kernel was launched. raw: the weights before their transformation. rest: what its tail starts from.
template <class scalar_t, class Weights, class Rest = NoTail>
bool try_aggregation_image(const AggregationProblem& p, const Weights& weights, const scalar_t* raw, const scalar_t* x,
                           scalar_t* y, const DeviceNumbers& numbers, Stream stream, const Rest& rest = {}) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const bool aligned = alignment_of(raw) == 16 && alignment_of(x) == 16 && alignment_of(y) == 16 && rest.aligned();
    ImageNeeds needs;
    needs.softmax = kIsSoftmax<Weights>;
    needs.norm = kIsNorm<Weights>;
    needs.pool = decltype(rest.start(1))::kPools;
    const ImageTile tile = choose_aggregation_image(p, sizeof(scalar_t), aligned, needs, numbers);
    if (!tile.possible()) return false;
    const auto tail = rest.start(tile.parts());
    using Tail = std::remove_const_t<decltype(tail)>;
    const auto launch = [&](auto* kernel) { launch_kernel(kernel, tile.launch, stream, p, tile, weights, raw, x, y, tail); };
    if constexpr (sizeof(scalar_t) == 4) launch(&aggregation_image_kernel<scalar_t, Weights, 0, Tail>);
    else if (tile.slab == 16) launch(&aggregation_image_kernel<scalar_t, Weights, 32, Tail>);
    else launch(&aggregation_image_kernel<scalar_t, Weights, 16, Tail>);
    return true;
  }
}

}  // namespace cotnet
