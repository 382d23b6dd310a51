// An aggregation and what follows it in a layer for evaluation, on raw pointers:
//     y[c] = silu(aggregation[c] + shift[c])        means[n, c] = mean over the map of y + k
// Shift and SiLU are applied to the sums in registers. The fast kernels sum their part of y + k as well: beside the bytes of
// the aggregation k is read, and nothing else. Where several blocks or warps share a map, a small kernel adds up their sums
// in order. After the other kernels a sweep reads y again, and k.
#pragma once

#include "cuda/group_norm_aggregation.cuh"
#include "cuda/map_sweep.cuh"

namespace cotnet {

// Sum of all maps.
template <int kMaps>
struct SumOfMaps : SweepPass {
  static constexpr int kInputs = kMaps, kNormRows = 0, kSums = 1;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc*, acc*, acc* sum) const {
    COTNET_UNROLL
    for (int i = 0; i < kMaps; ++i) *sum += in[i];
  }
};

// k may be null. scratch: group_norm_forward_scratch(p, parts) doubles; `allocate(count)` is memory for so many numbers of acc.
template <class scalar_t, class Allocate>
void group_norm_aggregation_pool(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps,
                                 const acc_t<scalar_t>* shift /* [G*C] */, const scalar_t* k /* [N, G*C, Ho, Wo] */,
                                 scalar_t* y /* [N, G*C, Ho, Wo] */, acc_t<scalar_t>* means /* [N, G*C] */,
                                 const NormParts& parts, double* scratch, const DeviceNumbers& numbers, Stream stream,
                                 const Allocate& allocate) {
  using acc = acc_t<scalar_t>;
  launch_group_norm_statistics(p, a, eps, parts, scratch, stream);
  const NormWeights<scalar_t> weights = norm_weights(p, a);
  const int64_t count = p.batch * p.heads * p.channels;
  const Pooling<scalar_t, Allocate> pooling{shift, k, means, count, p.out_plane(), allocate};
  if (try_aggregation_direct(p, weights, a.w, a.x, y, stream, pooling) ||
      try_aggregation_image(p, weights, a.w, a.x, y, numbers, stream, pooling) ||
      try_aggregation_tile<false>(p, weights, a.w, a.x, y, numbers, stream, pooling)) {
    if (pooling.parts > 1)
      launch_kernel(sweep_merge_kernel<acc>, choose_elements(count, kSweepMergeThreads), stream, pooling.sums,
                    int(pooling.parts), count, pooling.scale(), means);
    return;
  }
  const ShiftedSilu<acc> tail{shift};
  if (!try_aggregation_pixels<false>(p, weights, a.w, a.x, y, stream, tail))
    launch_aggregation_forward(p, weights, a.x, y, stream, tail);
  const MapProblem map{p.batch, p.heads * p.channels, p.out_plane(), p.channels_last};
  const double scale = 1 / double(p.out_plane());
  const SweepTables<acc> none{};
  if (k) sweep_sums<SumOfMaps<2>, scalar_t>(map, {{y, k}, {}}, none, scale, means, {}, numbers, stream, allocate);
  else sweep_sums<SumOfMaps<1>, scalar_t>(map, {{y}, {}}, none, scale, means, {}, numbers, stream, allocate);
}

}  // namespace cotnet
