// Statistics of group norm on channels_last weights: neighbouring groups lie side by side in every pixel, so a block takes
// as many of them as have 32 bytes of one tap, and reads whole vectors.
#pragma once

#include "cuda/aggregation.cuh"
#include "cuda/group_norm_aggregation_launch.h"

namespace cotnet {

constexpr int kNormImageThreads = 256;

// The elements of a slab of groups at one pixel, as vectors: a thread has the same one at every pixel.
template <class scalar_t>
struct NormVectors {
  static constexpr int kVector = 16 / int(sizeof(scalar_t));
  int taps, slab, of_piece, count;
  bool tap_major;

  COTNET_HD NormVectors(const AggregationProblem& p, int slab)
      : taps(int(p.taps())), slab(slab), of_piece(slab / kVector), count(taps * of_piece), tap_major(p.tap_major) {}

  // Group of the slab that element i of vector k belongs to, and the way back for tap t of group c.
  COTNET_DEVICE int group(int k, int i) const { return tap_major ? k % of_piece * kVector + i : (k * kVector + i) / taps; }
  COTNET_DEVICE int vector(int c, int t) const { return tap_major ? t * of_piece + c / kVector : (c * taps + t) / kVector; }
  COTNET_DEVICE int element(int c, int t) const { return (tap_major ? c : c * taps + t) % kVector; }
};

// The sum of group thread / 8 over all threads that have elements of it, in a fixed order, for each of eight threads.
// partial: [elements of a vector, threads], may be used again after the next barrier.
template <class scalar_t, int kVector>
COTNET_DEVICE double sum_of_group(const NormVectors<scalar_t>& v, int lanes, const acc_t<scalar_t> (&sums)[kVector],
                                  acc_t<scalar_t>* partial) {
  const int thread = int(threadIdx.x), c = thread / 8;
  COTNET_UNROLL
  for (int i = 0; i < kVector; ++i) partial[i * kNormImageThreads + thread] = sums[i];
  sync_block();
  double total = 0;
  if (c < v.slab)
    for (int n = thread % 8; n < v.taps * lanes; n += 8) {
      const int lane = n / v.taps, t = n - lane * v.taps;
      total += double(partial[v.element(c, t) * kNormImageThreads + lane * v.count + v.vector(c, t)]);
    }
  for (int distance = 4; distance > 0; distance /= 2) total += shuffle_xor(kAllLanes, total, distance);
  return total;
}

// A block owns one part of the pixels of an image, for a slab of groups: their means, then the squares of what remains. The
// second reading is of the cache.
template <class scalar_t>
COTNET_KERNEL(kNormImageThreads, 3)
group_norm_image_statistics_kernel(const AggregationProblem p, const NormParts parts, int slab,
                                   const scalar_t* w /* [N, G, Cw, K, Ho, Wo] */, double* moments /* [N*G*Cw, parts, 2] */) {
  using acc = acc_t<scalar_t>;
  constexpr int kVector = NormVectors<scalar_t>::kVector;
  COTNET_SHARED(acc, partial, kVector * kNormImageThreads);
  COTNET_SHARED(double, means, 16);
  const NormVectors<scalar_t> v(p, slab);
  const int64_t groups = p.heads * p.weight_channels, pixel = groups * v.taps, plane = p.out_plane();
  int64_t rest = int64_t(blockIdx.x);
  const int64_t first = split(rest, ceil_div(groups, slab)) * slab, part = split(rest, parts.count);
  const int64_t begin = part * (parts.elements / v.taps), more = begin + parts.elements / v.taps;
  const int64_t end = more < plane ? more : plane;
  const int thread = int(threadIdx.x), lanes = kNormImageThreads / v.count, lane = thread / v.count;
  const int k = thread - lane * v.count;  // the thread's vector
  const bool busy = lane < lanes && v.group(k, 0) < groups - first;
  const int64_t offset =
      v.tap_major ? k / v.of_piece * groups + first + k % v.of_piece * kVector : first * v.taps + k * kVector;
  const scalar_t* const from = w + rest * plane * pixel + offset;
  acc sums[kVector] = {}, mean[kVector] = {};
  COTNET_UNROLL_BY(4)
  for (int64_t q = begin + (busy ? lane : plane); q < end; q += lanes) {
    const auto pack = load_vec<kVector>(from + q * pixel);
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) sums[i] += widen(pack.at[i]);
  }
  const double size = double(end - begin) * v.taps, average = sum_of_group(v, lanes, sums, partial) / size;
  if (thread % 8 == 0 && thread / 8 < slab) means[thread / 8] = average;
  sync_block();
  COTNET_UNROLL
  for (int i = 0; i < kVector; ++i) {
    if (busy) mean[i] = acc(means[v.group(k, i)]);
    sums[i] = 0;
  }
  COTNET_UNROLL_BY(4)
  for (int64_t q = begin + (busy ? lane : plane); q < end; q += lanes) {
    const auto pack = load_vec<kVector>(from + q * pixel);
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const acc distance = widen(pack.at[i]) - mean[i];
      sums[i] = fma(distance, distance, sums[i]);
    }
  }
  // Distances were taken from the rounded mean: corrected for what rounding moved it by.
  const double moved = average - double(acc(average)), total = sum_of_group(v, lanes, sums, partial) - size * moved * moved;
  const int c = thread / 8;
  if (thread % 8 == 0 && c < slab && c < groups - first)
    store_vec(moments + 2 * ((rest * groups + first + c) * parts.count + part),
              Pack<double, 2>{{average, total > 0 || total != total ? total : 0}});
}

// True when the kernel was launched.
template <class scalar_t>
bool try_group_norm_image_statistics(const AggregationProblem& p, const NormParts& parts, const scalar_t* w, double* moments,
                                     Stream stream) {
  if constexpr (sizeof(scalar_t) > 4) {
    return false;
  } else {
    const int64_t groups = p.heads * p.weight_channels;
    const int slab = norm_image_slab(p, sizeof(scalar_t));
    if (slab == 0 || alignment_of(w) < 16) return false;
    Launch launch;
    launch.threads = kNormImageThreads;
    launch.grid_x = unsigned(p.batch * ceil_div(groups, slab) * parts.count);
    launch_kernel(group_norm_image_statistics_kernel<scalar_t>, launch, stream, p, parts, slab, w, moments);
    return true;
  }
}

}  // namespace cotnet
