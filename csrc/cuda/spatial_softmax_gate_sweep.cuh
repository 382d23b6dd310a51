// spatial_softmax_gate for long rows, and channels_last: two sweeps over a map, the first for the sums of its softmax. A
// block has all of it (whole kernel), or a chunk (gather and finish kernels, with a pause in between).
#pragma once

#include "cuda/spatial_softmax_gate_common.cuh"

namespace cotnet {

// Vectors that stay in shared memory between the sweeps, each read again by the thread that wrote it: [step, map, thread].
template <class scalar_t, bool kBackward>
struct KeptVectors {
  static constexpr int kMaps = kBackward ? 3 : 1;
  MapPack<scalar_t>* memory;
  int steps;

  COTNET_DEVICE MapPack<scalar_t>& at(int step, int map) const {
    return memory[(step * kMaps + map) * int(blockDim.x) + int(threadIdx.x)];
  }
  COTNET_DEVICE void put(int step, const GateVectors<scalar_t>& in) const {
    at(step, 0) = in.x;
    if (kBackward) at(step, 1) = in.v, at(step, 2) = in.t;
  }
  COTNET_DEVICE void get(int step, GateVectors<scalar_t>& in) const {
    in.x = at(step, 0);
    if (kBackward) in.v = at(step, 1), in.t = at(step, 2);
  }
};

// Adds a batch of vectors to a thread's sums: one for the row, or one for each of a vector's channels. The maximum is
// raised once for the batch.
template <bool kBackward, int kCount, int kSums, class scalar_t>
COTNET_DEVICE void add_batch(const GateVectors<scalar_t>* in, SoftmaxSums<acc_t<scalar_t>>* sums) {
  using acc = acc_t<scalar_t>;
  constexpr int kVector = kMapVector<scalar_t>;
  COTNET_UNROLL
  for (int k = 0; k < kSums; ++k) {
    SoftmaxSums<acc>& own = sums[k];
    acc top = own.top;
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b)
      COTNET_UNROLL
      for (int i = k; i < kVector; i += kSums) top = maximum(top, widen(in[b].x.at[i]));
    own.raise(top);
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b)
      COTNET_UNROLL
      for (int i = k; i < kVector; i += kSums) {
        const acc share = fast_exponential(widen(in[b].x.at[i]) - top);
        own.sum += share;
        if (kBackward) own.dot = fma(share, widen(in[b].t.at[i]) * widen(in[b].v.at[i]), own.dot);
      }
  }
}

// First sweep: the sums of a thread's vectors.
template <bool kBackward, class Vectors, class scalar_t>
COTNET_DEVICE void gather(const GateMaps<scalar_t>& maps, const Vectors& vectors,
                          const KeptVectors<scalar_t, kBackward>& kept, SoftmaxSums<acc_t<scalar_t>>* sums) {
  constexpr int kCount = kBackward ? kGateBatch / 2 : kGateBatch;
  const int steps = vectors.steps();
  COTNET_UNROLL
  for (int i = 0; i < Vectors::kSums; ++i) sums[i] = SoftmaxSums<acc_t<scalar_t>>::none();
  for (int step = 0; step < steps; step += kCount) {
    typename Vectors::Slot slots[kCount];
    GateVectors<scalar_t> in[kCount];
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) {
      slots[b] = vectors.slot(step + b);  // empty beyond the end
      in[b].x = load_slot(maps.x, slots[b]);
    }
    if constexpr (kBackward) load_v_and_t<kCount>(maps, slots, in);
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) mend_slot(in[b].x, maps.x, slots[b], minus_infinity<scalar_t>());
    if constexpr (kBackward) mend_v_and_t<kCount>(maps, slots, in);
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b)
      if (step + b < kept.steps) kept.put(step + b, in[b]);
    add_batch<kBackward, kCount, Vectors::kSums>(in, sums);
  }
}

// Second sweep, backwards: what was read last is in a cache most likely.
template <bool kBackward, class Vectors, class scalar_t>
COTNET_DEVICE void finish(const GateMaps<scalar_t>& maps, const Vectors& vectors,
                          const KeptVectors<scalar_t, kBackward>& kept, const SoftmaxSums<acc_t<scalar_t>>* sums) {
  constexpr int kCount = kGateBatch / 2, kVector = kMapVector<scalar_t>;
  const int steps = (vectors.steps() + kCount - 1) / kCount * kCount;
  for (int step = steps - kCount; step >= 0; step -= kCount) {
    typename Vectors::Slot slots[kCount];
    GateVectors<scalar_t> in[kCount];
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) slots[b] = vectors.slot(step + b);
    const bool again = step + kCount > kept.steps;  // something of the batch is not in shared memory
    if (!kBackward || again) load_v_and_t<kCount>(maps, slots, in);
    if (again)
      COTNET_UNROLL
      for (int b = 0; b < kCount; ++b) in[b].x = load_slot(maps.x, slots[b]);
    if (!kBackward || again) mend_v_and_t<kCount>(maps, slots, in);
    if (again)
      COTNET_UNROLL
      for (int b = 0; b < kCount; ++b) mend_slot(in[b].x, maps.x, slots[b], minus_infinity<scalar_t>());
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b)
      if (step + b < kept.steps) kept.get(step + b, in[b]);
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) {
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) gate_element<kBackward>(in[b], i, sums[i % Vectors::kSums], maps.grad_v);
      store_results<kBackward>(maps, slots[b], in[b]);
    }
  }
}

// The vectors of this block: a chunk of a row, or of a slab of channels of an image.
template <class scalar_t>
COTNET_DEVICE PlaneVectors<scalar_t> vectors_of(const PlaneVectors<scalar_t>*, const GatePlan& plan, int64_t unit,
                                                int64_t chunk) {
  const int64_t begin = chunk * plan.chunk, end = begin + plan.chunk < plan.plane ? begin + plan.chunk : plan.plane;
  return {unit * plan.plane + begin, unit * plan.plane + end, plan.aligned};
}
template <class scalar_t>
COTNET_DEVICE ImageVectors<scalar_t> vectors_of(const ImageVectors<scalar_t>*, const GatePlan& plan, int64_t unit,
                                                int64_t chunk) {
  const int64_t image = unit / plan.slabs, begin = chunk * plan.chunk;
  const int64_t left = plan.plane - begin, pixels = left < plan.chunk ? left : plan.chunk;
  const int64_t slab = unit - image * plan.slabs;
  return {image * plan.plane * plan.channels, begin, int(pixels), plan.channels, slab, plan.lanes, plan.aligned};
}

// A block has a whole row, or a slab of channels of a whole image.
template <class Vectors, int kThreads, bool kBackward, class scalar_t>
COTNET_KERNEL(kThreads, 1)
spatial_softmax_gate_whole_kernel(const GateMaps<scalar_t> all /* [N, C, H, W] */, const GatePlan plan) {
  using Sums = SoftmaxSums<acc_t<scalar_t>>;
  COTNET_SHARED_DYNAMIC(shared);
  const int64_t unit = unit_number();
  if (unit >= plan.units) return;
  const Vectors vectors = vectors_of(static_cast<const Vectors*>(nullptr), plan, unit, 0);
  const GateMaps<scalar_t> maps = all.from(vectors.origin);
  const KeptVectors<scalar_t, kBackward> kept{reinterpret_cast<MapPack<scalar_t>*>(shared), plan.kept};
  Sums* const memory = reinterpret_cast<Sums*>(&kept.memory[plan.kept * kept.kMaps * int(blockDim.x)]);
  Sums sums[Vectors::kSums];
  gather<kBackward>(maps, vectors, kept, sums);
  merge_block<Vectors::kSums>(sums, vectors.lanes(), memory, true);
  finish<kBackward>(maps, vectors, kept, sums);
}

// The sums of this thread's channels over a chunk, or of the row: partial [units, chunks, lanes, kSums].
template <class Vectors, class acc>
COTNET_DEVICE SoftmaxSums<acc>* partial_of(SoftmaxSums<acc>* partial, const Vectors& vectors, const GatePlan& plan,
                                           int64_t unit, int64_t chunk) {
  return partial + ((unit * plan.chunks + chunk) * vectors.lanes() + int(threadIdx.x) % vectors.lanes()) * Vectors::kSums;
}

// A block has one chunk of a unit. First kernel: its sums.
template <class Vectors, bool kBackward, class scalar_t>
COTNET_KERNEL(kGateSplitThreads, Vectors::kSums == 1 ? 3 : 2)
spatial_softmax_gate_gather_kernel(const GateMaps<scalar_t> all /* [N, C, H, W] */, SoftmaxSums<acc_t<scalar_t>>* partial,
                                   const GatePlan plan) {
  using Sums = SoftmaxSums<acc_t<scalar_t>>;
  COTNET_SHARED_DYNAMIC(shared);
  const int64_t unit = unit_number(), chunk = blockIdx.x;
  if (unit >= plan.units) return;
  const Vectors vectors = vectors_of(static_cast<const Vectors*>(nullptr), plan, unit, chunk);
  const GateMaps<scalar_t> maps = all.from(vectors.origin);
  Sums sums[Vectors::kSums];
  gather<kBackward>(maps, vectors, KeptVectors<scalar_t, kBackward>{nullptr, 0}, sums);
  merge_block<Vectors::kSums>(sums, vectors.lanes(), reinterpret_cast<Sums*>(shared), false);
  if (int(threadIdx.x) >= vectors.lanes()) return;
  Sums* const own = partial_of(partial, vectors, plan, unit, chunk);
  COTNET_UNROLL
  for (int i = 0; i < Vectors::kSums; ++i) own[i] = sums[i];
}

// Second kernel: every block merges the sums of all chunks of its unit, in the same order, and finishes its own.
template <class Vectors, bool kBackward, class scalar_t>
COTNET_KERNEL(kGateSplitThreads, Vectors::kSums == 1 ? 3 : 2)
spatial_softmax_gate_finish_kernel(const GateMaps<scalar_t> all /* [N, C, H, W] */, SoftmaxSums<acc_t<scalar_t>>* partial,
                                   const GatePlan plan) {
  using Sums = SoftmaxSums<acc_t<scalar_t>>;
  COTNET_SHARED_DYNAMIC(shared);
  const int64_t unit = unit_number();
  if (unit >= plan.units) return;
  const Vectors vectors = vectors_of(static_cast<const Vectors*>(nullptr), plan, unit, blockIdx.x);
  const GateMaps<scalar_t> maps = all.from(vectors.origin);
  Sums sums[Vectors::kSums];
  COTNET_UNROLL
  for (int i = 0; i < Vectors::kSums; ++i) sums[i] = Sums::none();
  const int threads = int(blockDim.x) / vectors.lanes();  // that share the chunks
  for (int chunk = int(threadIdx.x) / vectors.lanes(); chunk < plan.chunks; chunk += threads) {
    const Sums* const next = partial_of(partial, vectors, plan, unit, chunk);
    COTNET_UNROLL
    for (int i = 0; i < Vectors::kSums; ++i) sums[i].merge(next[i]);
  }
  merge_block<Vectors::kSums>(sums, vectors.lanes(), reinterpret_cast<Sums*>(shared), true);
  finish<kBackward>(maps, vectors, KeptVectors<scalar_t, kBackward>{nullptr, 0}, sums);
}

}  // namespace cotnet
