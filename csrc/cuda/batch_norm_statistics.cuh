// Mean and variance of each channel: of every chunk its mean and the squares around that mean, from values that are in
// registers, and then of all chunks together. Never differences of large squares.
#pragma once

#include "cuda/norm_table.cuh"

namespace cotnet {

// Of one map, with two sums, and the mean in the place of a coefficient. All pixels of a thread are in its registers.
constexpr int kStatisticItems = kSweepItems<1>, kStatisticBatch = kSweepBatch<1>;
constexpr SweepNeeds kStatisticNeeds{kStatisticItems, kStatisticBatch, kStatisticBatch, 1, 2};

// Of a chunk: its mean, which is rounded, and the mean of what is left of it, and the squares around both together.
constexpr int kMoments = 3;

// `rest` and `squares`: sums of the distances of `count` elements from the mean, and of their squares.
template <class acc>
COTNET_DEVICE void write_moments(acc* to, int64_t channels, acc mean, acc rest, acc squares, int count) {
  const acc left = rest / acc(count), around = fma(-rest, left, squares);
  store_narrow(to, mean);
  store_narrow(to + channels, left);
  store_narrow(to + 2 * channels, around < 0 ? acc(0) : around);  // NaN stays NaN
}
template <class acc>
COTNET_DEVICE double mean_of_chunk(const acc* moments, int64_t channels) {
  return double(load_wide(moments)) + double(load_wide(moments + channels));
}

template <class scalar_t>
COTNET_KERNEL(kSweepThreads, 3)
batch_norm_statistics_planes_kernel(const scalar_t* all /* [N, C, H, W] */, acc_t<scalar_t>* moments /* [chunks, N, 3, C] */,
                                    const SweepPlan plan) {
  using acc = acc_t<scalar_t>;
  COTNET_SHARED_DYNAMIC(shared);
  const BlockRows<scalar_t> block(plan);
  if (block.rows == 0) return;
  const PlaneVectors<scalar_t> vectors = block.vectors(plan.aligned);
  const scalar_t* const x = all + vectors.origin;
  MapSlot<int> slots[kStatisticItems];
  MapPack<scalar_t> packs[kStatisticItems];
  COTNET_UNROLL
  for (int k = 0; k < kStatisticItems; ++k) slots[k] = vectors.slot(k);
  COTNET_UNROLL
  for (int k = 0; k < kStatisticItems; ++k) packs[k] = load_slot(x, slots[k]);
  COTNET_UNROLL
  for (int k = 0; k < kStatisticItems; ++k) mend_slot(packs[k], x, slots[k], narrow<scalar_t>(acc(0)));

  const RowSums<scalar_t, 1> first_sums(plan, kStatisticItems, reinterpret_cast<acc*>(shared));
  const RowSums<scalar_t, 2> second_sums(plan, kStatisticItems, reinterpret_cast<acc*>(shared));
  acc* const means = second_sums.end();  // [rows]
  COTNET_UNROLL
  for (int k = 0; k < kStatisticItems; ++k) {
    acc sum = 0;
    block.each(k, slots[k], vectors.first, [&](int) { sum = 0; }, [&](int i) { sum += widen(packs[k].at[i]); },
               [&](int piece) { first_sums.keep(k, piece, &sum); });
  }
  sync_block();
  first_sums.merge(block, vectors.first);
  sync_block();
  const int row = int(threadIdx.x);
  if (row < block.rows) means[row] = first_sums.total(row, 0) / acc(block.length);
  sync_block();
  COTNET_UNROLL
  for (int k = 0; k < kStatisticItems; ++k) {
    acc mean = 0, sums[2];
    const auto enter = [&](int of_row) {
      mean = means[of_row];
      sums[0] = sums[1] = 0;
    };
    const auto element = [&](int i) {
      const acc distance = widen(packs[k].at[i]) - mean;
      sums[0] += distance;
      sums[1] = fma(distance, distance, sums[1]);
    };
    block.each(k, slots[k], vectors.first, enter, element, [&](int piece) { second_sums.keep(k, piece, sums); });
  }
  sync_block();
  second_sums.merge(block, vectors.first);
  sync_block();
  if (row >= block.rows) return;
  const int64_t own = block.first + row, image = own / plan.channels, channel = own - image * plan.channels;
  acc* const to = moments + kMoments * (blockIdx.x * plan.rows + image * plan.channels) + channel;
  write_moments(to, plan.channels, means[row], second_sums.total(row, 0), second_sums.total(row, 1), block.length);
}

template <class scalar_t>
COTNET_KERNEL(kSweepImageThreads, 4)
batch_norm_statistics_images_kernel(const scalar_t* x /* [N, H, W, C] */, acc_t<scalar_t>* moments /* [chunks, N, 3, C] */,
                                    const SweepPlan plan) {
  using acc = acc_t<scalar_t>;
  constexpr int kVector = kMapVector<scalar_t>;
  COTNET_SHARED_DYNAMIC(shared);
  const int64_t unit = unit_number();
  if (unit >= plan.units) return;
  const BlockSlab<scalar_t> block(plan, unit);
  const ImageVectors<scalar_t> vectors = block.vectors(plan);
  MapSlot<int64_t> slots[kStatisticBatch];
  MapPack<scalar_t> packs[kStatisticBatch];
  COTNET_UNROLL
  for (int b = 0; b < kStatisticBatch; ++b) slots[b] = vectors.slot(b);  // empty beyond the end
  COTNET_UNROLL
  for (int b = 0; b < kStatisticBatch; ++b) packs[b] = load_slot(x, slots[b]);
  COTNET_UNROLL
  for (int b = 0; b < kStatisticBatch; ++b) mend_slot(packs[b], x, slots[b], narrow<scalar_t>(acc(0)));

  acc* const means = reinterpret_cast<acc*>(shared);  // [width]
  const SlabSums<scalar_t, 1> first_sums(plan, means + block.width);
  const SlabSums<scalar_t, 2> second_sums(plan, means + block.width);
  acc sum[1][kVector], sums[2][kVector];
  COTNET_UNROLL
  for (int e = 0; e < kVector; ++e) {
    sum[0][e] = 0;
    COTNET_UNROLL
    for (int b = 0; b < kStatisticBatch; ++b) sum[0][e] += widen(packs[b].at[e]);  // zeros outside
  }
  first_sums.keep(sum);
  sync_block();
  for (int i = int(threadIdx.x); i < block.width; i += int(blockDim.x)) means[i] = first_sums.total(0, i) / acc(block.pixels);
  sync_block();
  COTNET_UNROLL
  for (int e = 0; e < kVector; ++e) {
    const acc mean = means[vectors.lane() * kVector + e];
    sums[0][e] = sums[1][e] = 0;
    COTNET_UNROLL
    for (int b = 0; b < kStatisticBatch; ++b) {
      const acc distance = slots[b].has(e) ? widen(packs[b].at[e]) - mean : acc(0);
      sums[0][e] += distance;
      sums[1][e] = fma(distance, distance, sums[1][e]);
    }
  }
  second_sums.keep(sums);
  sync_block();
  for (int i = int(threadIdx.x); i < block.width; i += int(blockDim.x)) {
    const int64_t channel = block.slab * block.width + i;
    if (channel >= plan.channels) return;
    acc* const to = moments + kMoments * (blockIdx.x * plan.rows + block.image * plan.channels) + channel;
    write_moments(to, plan.channels, means[i], second_sums.total(0, i), second_sums.total(1, i), block.pixels);
  }
}

// What BatchNorm makes of the statistics.
template <class acc>
struct NormOutputs {
  const acc* weight;  // [C], or null
  const acc* bias;    // [C], or null
  double eps;
  acc* norm;      // [3, C]
  acc* factor;    // [C]
  acc* variance;  // [C], the biased one
};

// A chunk counts as many elements as it has. Of nothing, mean and variance are 0.
template <class acc>
COTNET_KERNEL(kTableThreads, 1)
batch_norm_statistics_merge_kernel(const acc* moments /* [chunks, N, 3, C] */, int64_t batch, int chunks, int64_t plane,
                                   int64_t chunk, int64_t channels, const NormOutputs<acc> to) {
  COTNET_SHARED(double, memory, 2 * kTableMemory);
  const TablePlace place;
  const int64_t c = place.channel, parts = c < channels ? batch * chunks : 0;
  const double count = double(batch) * double(plane), share = count > 0 ? 1 / count : 0;
  const auto size = [&](int64_t part) {
    const int64_t left = part < (chunks - 1) * batch ? chunk : plane - (chunks - 1) * chunk;  // the last may have fewer
    return double(left);
  };
  double mean = 0, squares = 0;
  COTNET_UNROLL_BY(4)
  for (int64_t part = place.slice; part < parts; part += kTableSlices)
    mean += size(part) * mean_of_chunk(moments + kMoments * part * channels + c, channels);
  mean = sum_slices(mean, memory) * share;
  COTNET_UNROLL_BY(4)
  for (int64_t part = place.slice; part < parts; part += kTableSlices) {  // from the cache
    const acc* const own = moments + kMoments * part * channels + c;
    const double apart = mean_of_chunk(own, channels) - mean;
    squares += double(load_wide(own + 2 * channels)) + size(part) * apart * apart;
  }
  squares = sum_slices(squares, memory + kTableMemory);
  if (place.slice > 0 || c >= channels) return;
  const double variance = squares * share, factor = inverse_sqrt(variance + to.eps);
  store_narrow(to.norm + c, acc(mean));
  store_narrow(to.norm + channels + c, acc(to.weight ? factor * double(load_wide(to.weight + c)) : factor));
  store_narrow(to.norm + 2 * channels + c, to.bias ? load_wide(to.bias + c) : acc(0));
  store_narrow(to.factor + c, acc(factor));
  store_narrow(to.variance + c, acc(variance));
}

// `allocate(count)` is memory for so many numbers of acc.
template <class scalar_t, class Allocate>
void norm_statistics_launch(const MapProblem& whole, const scalar_t* x, const NormOutputs<acc_t<scalar_t>>& to,
                            const DeviceNumbers& device, Stream stream, const Allocate& allocate) {
  using acc = acc_t<scalar_t>;
  const MapProblem p = without_images(whole);
  const SweepPlan plan = choose_sweep(p, kStatisticNeeds, sizeof(scalar_t), are_aligned({x}), device);
  acc* const moments = allocate(kMoments * plan.rows * plan.chunks);
  if (plan.channels_last)
    launch_kernel(batch_norm_statistics_images_kernel<scalar_t>, plan.launch, stream, x, moments, plan);
  else
    launch_kernel(batch_norm_statistics_planes_kernel<scalar_t>, plan.launch, stream, x, moments, plan);
  launch_kernel(batch_norm_statistics_merge_kernel<acc>, choose_tables(p.channels), stream, moments, p.batch, plan.chunks,
                p.plane, plan.chunk, p.channels, to);
}

}  // namespace cotnet
