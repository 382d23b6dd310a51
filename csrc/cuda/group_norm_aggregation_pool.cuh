// An aggregation and what follows it in a layer for evaluation, on raw pointers:
//     y[c] = silu(aggregation[c] + shift[c])        means[n, c] = mean over the map of y + k
// Shift and SiLU are applied to the sums in registers. The mean comes from a sweep of its own: a block of the aggregation has
// a tile of a map, and sums of tiles would have to be put together by another kernel anyway. Bytes, in maps, beside those of
// the aggregation: y again, most of it from the second-level cache, and k.
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
  group_norm_aggregation_forward(p, a, eps, y, parts, scratch, numbers, stream, ShiftedSilu<acc>{shift});
  const MapProblem map{p.batch, p.heads * p.channels, p.out_plane(), p.channels_last};
  const double scale = 1 / double(p.out_plane());
  const SweepTables<acc> none{};
  if (k) sweep_sums<SumOfMaps<2>, scalar_t>(map, {{y, k}, {}}, none, scale, means, {}, numbers, stream, allocate);
  else sweep_sums<SumOfMaps<1>, scalar_t>(map, {{y}, {}}, none, scale, means, {}, numbers, stream, allocate);
}

}  // namespace cotnet
