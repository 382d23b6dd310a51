// Aggregations of 3 x 3 taps, stride 1, without shared memory: NCHW maps too large for whole tiles, whose rows are whole
// vectors of 16 bytes.
//
// A thread owns one vector of neighbouring columns and eight channels that share their weights. Threads follow each other as
// vectors do in memory, from row to row and from plane to plane: no lane is idle, and the column before a vector and the one
// behind it are in the lanes beside. A row of taps at a time: three vectors of weights, widened and transformed once for
// eight channels, then the row of each channel. Rows come three times, twice of these from the L1 cache; weights come once.
#pragma once

#include "cuda/aggregation.cuh"
#include "cuda/aggregation_direct_launch.h"
#include "cuda/aggregation_tap_weights.cuh"

namespace cotnet {

// ---- the kernel

// Columns -1 to kColumns of a thread's row, those beside from the lanes beside; lanes 0 and 31 load theirs. Zeros where the
// row is not inside of the map, and outside of the row. All lanes of a warp must come.
template <int kColumns, class scalar_t>
COTNET_DEVICE void load_row(const scalar_t* from, bool inside, bool first, bool last, int lane,
                            acc_t<scalar_t> (&values)[kColumns + 2]) {
  using acc = acc_t<scalar_t>;
  const Pack<scalar_t, kColumns> pack = load_vec_if<kColumns>(from, inside);
  const bool alone = inside && (lane == 0 ? !first : lane == 31 && !last);
  const acc beside = load_wide_if(lane == 0 ? from - 1 : from + kColumns, alone);
  COTNET_UNROLL
  for (int i = 0; i < kColumns; ++i) values[i + 1] = widen(pack.at[i]);
  const acc before = shuffle_up(kAllLanes, values[kColumns], 1), behind = shuffle_down(kAllLanes, values[1], 1);
  values[0] = first ? acc(0) : lane == 0 ? beside : before;
  values[kColumns + 1] = last ? acc(0) : lane == 31 ? beside : behind;
}

// The sums of eight numbers over a warp: that of number lane / 4 for each lane.
template <class acc>
COTNET_DEVICE acc sum_eight(acc (&sums)[kDirectChannels], int lane) {
  COTNET_UNROLL
  for (int half = kDirectChannels / 2, distance = 16; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane & distance;
    COTNET_UNROLL
    for (int i = 0; i < half; ++i) {
      const acc other = shuffle_xor(kAllLanes, upper ? sums[i] : sums[i + half], distance);
      sums[i] = (upper ? sums[i + half] : sums[i]) + other;
    }
  }
  acc sum = sums[0];
  sum += shuffle_xor(kAllLanes, sum, 2);
  return sum + shuffle_xor(kAllLanes, sum, 1);
}

// Leaves the sums of eight channels over the vectors that a warp has of a plane: of that of its first lane, and perhaps of
// the next one. They are a part of the planes' sums, whose number is that of the warp, counted from the first with a vector
// of the plane. unit: the plane of a thread; channel: its first in a table [N, C].
template <class Tail, class acc>
COTNET_DEVICE void pool_warp(const Tail& tail, const Direct& direct, int64_t unit, int vector, int64_t channel, int64_t step,
                             int lane, bool busy, const acc (&sums)[kDirectChannels]) {
  const int before = int(unit * direct.plane_vectors % 32);  // lanes of the plane's first warp that have the one before
  const int part = shuffle(kAllLanes, (before + vector) / 32, 0);
  const bool second = busy && vector < lane;  // the thread has the next plane
  const bool any = shuffle(kAllLanes, int(busy), 0), two = ballot(kAllLanes, second) != 0;
  acc own[kDirectChannels];
  COTNET_UNROLL
  for (int j = 0; j < kDirectChannels; ++j) own[j] = busy && !second ? sums[j] : acc(0);
  const acc first = sum_eight(own, lane);
  const int64_t to = shuffle(kAllLanes, channel, 0) + lane / 4 * step;
  if (any && lane % 4 == 0) tail.write(part, to, first);
  if (two) {
    COTNET_UNROLL
    for (int j = 0; j < kDirectChannels; ++j) own[j] = second ? sums[j] : acc(0);
    const acc next = sum_eight(own, lane);
    const int64_t to_next = shuffle(kAllLanes, channel, 31) + lane / 4 * step;
    if (lane % 4 == 0) tail.write(0, to_next, next);
  }
  if (!busy || vector != direct.plane_vectors - 1) return;
  // Planes that fewer warps share than others.
  for (int i = (before + vector) / 32 + 1; i < direct.parts; ++i)
    for (int j = 0; j < kDirectChannels; ++j) tail.write(i, channel + j * step, 0);
}

template <class scalar_t, class Weights, int kColumns, class Tail>
COTNET_KERNEL(kDirectThreads, 3)
aggregation_direct_kernel(const AggregationProblem p, const Direct direct, const Weights weights,
                          const scalar_t* raw /* [N, Cw, 9, H, W] */, const scalar_t* x /* [N, C, H, W] */,
                          scalar_t* y /* [N, C, H, W] */, const Tail tail) {
  using acc = acc_t<scalar_t>;
  // Threads beyond the last do the last one's work, for their neighbours' sake, and store nothing.
  int64_t rest = int64_t(blockIdx.x) * kDirectThreads + threadIdx.x;
  const bool busy = rest < direct.threads;
  rest = busy ? rest : direct.threads - 1;
  const int vector = int(split(rest, direct.plane_vectors)), row = vector / direct.row_vectors;
  [[maybe_unused]] const int64_t unit = rest;  // planes of weights, by chunk of channels
  const int64_t weight_channel = split(rest, p.weight_channels), chunk = split(rest, direct.chunks), image = rest;
  const int height = int(p.rows.out), lane = int(threadIdx.x) % 32, segment = vector - row * direct.row_vectors;
  const bool first = segment == 0, last = segment == direct.row_vectors - 1;
  const int64_t plane = p.out_plane(), position = int64_t(vector) * kColumns, step = p.weight_channels * plane;
  const WeightPlace place{image, weight_channel, p.weight_channels, position, plane, 9};
  const int64_t channel = chunk * kDirectChannels * p.weight_channels + weight_channel;
  const int64_t offset = (image * p.channels + channel) * plane + position;
  const scalar_t* const w_from = raw + place.unit() * 9 * plane + position;

  using Source = TapWeights<Weights, kColumns>;
  const auto read = [&](int t, acc (&w)[kColumns]) {
    const scalar_t* const from = w_from + t * plane;
    // What is read twice should be in the cache the second time.
    const Pack<scalar_t, kColumns> pack = Source::kReadsTwice ? load_vec<kColumns>(from) : load_streaming<kColumns>(from);
    COTNET_UNROLL
    for (int i = 0; i < kColumns; ++i) w[i] = widen(pack.at[i]);
  };
  Source source(weights, place, read);
  acc sums[kDirectChannels][kColumns] = {};
  COTNET_UNROLL_BY(1)  // the vectors of one row are what registers have room for
  for (int u = 0; u < 3; ++u) {
    const bool inside = row + u - 1 >= 0 && row + u - 1 < height;
    acc w[3][kColumns];
    COTNET_UNROLL
    for (int v = 0; v < 3; ++v) {
      read(u * 3 + v, w[v]);
      source.transform(u * 3 + v, w[v]);
    }
    const scalar_t* const from = x + offset + (u - 1) * p.cols.out;
    COTNET_UNROLL
    for (int j = 0; j < kDirectChannels; ++j) {
      acc values[kColumns + 2];
      load_row<kColumns>(from + j * step, inside, first, last, lane, values);
      COTNET_UNROLL
      for (int v = 0; v < 3; ++v) {
        COTNET_UNROLL
        for (int i = 0; i < kColumns; ++i) sums[j][i] = fma(w[v][i], values[i + v], sums[j][i]);
      }
    }
  }
  if (!Tail::kPools && !busy) return;
  [[maybe_unused]] acc pooled[kDirectChannels];
  COTNET_UNROLL
  for (int j = 0; j < kDirectChannels; ++j) {
    source.finish(sums[j]);
    const auto finish = tail.of(channel + j * p.weight_channels);
    Pack<scalar_t, kColumns> pack;
    COTNET_UNROLL
    for (int i = 0; i < kColumns; ++i) pack.at[i] = narrow<scalar_t>(finish(sums[j][i]));
    if (busy) store_vec(y + offset + j * step, pack);
    pooled[j] = 0;
    COTNET_UNROLL
    for (int i = 0; i < kColumns; ++i) pooled[j] += widen(pack.at[i]);
  }
  if constexpr (Tail::kPools) {
    const scalar_t* const map = (tail.map ? tail.map : y) + offset;  // not read where there is none
    COTNET_UNROLL
    for (int j = 0; j < kDirectChannels; ++j) {
      const Pack<scalar_t, kColumns> beside = load_vec_if<kColumns>(map + j * step, tail.map);
      COTNET_UNROLL
      for (int i = 0; i < kColumns; ++i) pooled[j] += widen(beside.at[i]);
    }
    pool_warp(tail, direct, unit, vector, image * p.channels + channel, p.weight_channels, lane, busy, pooled);
  }
}

// True when the kernel was launched. raw: the weights before their transformation. rest: what its tail starts from.
template <class scalar_t, class Weights, class Rest = NoTail>
bool try_aggregation_direct(const AggregationProblem& p, const Weights& weights, const scalar_t* raw, const scalar_t* x,
                            scalar_t* y, Stream stream, const Rest& rest = {}) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    constexpr int kColumns = 16 / sizeof(scalar_t);
    const bool aligned = alignment_of(raw) == 16 && alignment_of(x) == 16 && alignment_of(y) == 16 && rest.aligned();
    const Direct direct = choose_aggregation_direct(p, sizeof(scalar_t), kColumns, aligned);
    if (!direct.possible()) return false;
    const auto tail = rest.start(direct.parts);
    using Tail = std::remove_const_t<decltype(tail)>;
    launch_kernel(&aggregation_direct_kernel<scalar_t, Weights, kColumns, Tail>, direct.launch, stream, p, direct, weights, raw,
                  x, y, tail);
    return true;
  }
}

}  // namespace cotnet
