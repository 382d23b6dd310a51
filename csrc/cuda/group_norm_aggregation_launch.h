// How many blocks share one group of group_norm_aggregation, and the memory its kernels hand to each other.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "core/window.h"
#include "cuda/aggregation_tile_backward_launch.h"
#include "cuda/aggregation_image_launch.h"
#include "cuda/aggregation_tile_launch.h"
#include "cuda/launch.h"

namespace cotnet {

// Parts of a group whose statistics different blocks take.
struct NormParts {
  int64_t count;
  int64_t elements;  // of each, the last may have fewer
};

// Groups that a block takes together where they lie side by side in memory, 0 where it takes one: 32 bytes of each tap, of
// whole vectors of 16 bytes, with a thread for each vector of a pixel.
inline int norm_image_slab(const AggregationProblem& p, int element_bytes) {
  const int64_t groups = p.heads * p.weight_channels;
  if (!p.channels_last || element_bytes > 4 || groups * element_bytes % 16 != 0) return 0;
  const int bytes = groups * element_bytes > 16 ? 32 : 16;
  return p.taps() * (bytes / 16) <= 128 ? bytes / element_bytes : 0;
}

// A group is K * Ho * Wo elements, at 14 x 14 some 1764, and N * G * Cw of them mostly fill a GPU. Where they are few they
// are split until 4 blocks of 256 threads come to each multiprocessor, but no part has fewer than 2048 elements, 8 a thread:
// below that a block costs more than it reads.
inline NormParts choose_group_norm_statistics(const AggregationProblem& p, int element_bytes, const DeviceNumbers& numbers) {
  if (const int slab = norm_image_slab(p, element_bytes); slab > 0) {
    // Whole pixels, from 64 on: a thread takes five of them. Up to 1024, whose sums are as exact as float32 allows.
    const int64_t plane = p.out_plane(), blocks = p.batch * ceil_div(p.heads * p.weight_channels, slab);
    const int64_t wanted = ceil_div(4 * int64_t(numbers.sm_count), std::max<int64_t>(blocks, 1));
    const int64_t parts = std::max(ceil_div(plane, 1024), std::min(wanted, std::max<int64_t>(1, plane / 64)));
    const int64_t pixels = ceil_div(plane, parts);
    return {ceil_div(plane, pixels), pixels * p.taps()};
  }
  constexpr int64_t least = 2048;
  const int64_t size = p.taps() * p.out_plane(), groups = p.batch * p.heads * p.weight_channels;
  const int64_t wanted = ceil_div(4 * int64_t(numbers.sm_count), std::max<int64_t>(groups, 1));
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, size / least));
  const int64_t elements = ceil_div(size, parts);
  return {ceil_div(size, elements), elements};
}

// Strips of a map whose sums different blocks of the backward take, 1 where a block has whole maps or there are no tiles.
inline int group_norm_strips(const AggregationProblem& p, int element_bytes, const DeviceNumbers& numbers) {
  if (p.channels_last) {
    const ImageTile tile = choose_aggregation_image(p, element_bytes, true, image_sums_needs(), numbers);
    return tile.possible() ? tile.parts() : 1;
  }
  const Tile tile = choose_aggregation_tile(p, element_bytes, true, {true, false, true}, numbers);
  return tile.possible() ? tile.strips : 1;
}
// The same of the kernel that makes the gradient of the input as well.
inline int group_norm_backward_strips(const AggregationProblem& p, int element_bytes, const DeviceNumbers& numbers) {
  const BackwardTile tile = choose_aggregation_tile_backward(p, element_bytes, true, norm_backward_needs(false), numbers);
  return tile.possible() ? tile.strips : 1;
}

// Doubles of scratch memory. Forward: mean and sum of squared distances of each part. Backward: two sums for each tap of
// each group, two for each group, and the sums of strips before they are summed.
inline int64_t group_norm_forward_scratch(const AggregationProblem& p, const NormParts& parts) {
  return 2 * p.batch * p.heads * p.weight_channels * parts.count;
}
inline int64_t group_norm_backward_scratch(const AggregationProblem& p, int element_bytes, const DeviceNumbers& numbers) {
  const int strips =
      std::max(group_norm_strips(p, element_bytes, numbers), group_norm_backward_strips(p, element_bytes, numbers));
  return 2 * p.batch * p.heads * p.weight_channels * (p.taps() * (strips > 1 ? 1 + strips : 1) + 1);
}

}  // namespace cotnet
