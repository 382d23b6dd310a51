// spatial_softmax_gate and its gradients: with p = softmax over the map of x,
//     y = s + p*v        grad_v = p*grad_y        grad_x = p*(grad_y*v - sum of p*grad_y*v)
//
// Bytes, in maps: forward reads x, v, s and writes y, 4; backward reads x, v, grad_y and writes grad_x, grad_v, 5. Short
// rows (tile kernel) and what shared memory holds (whole kernel) move no more. Beyond that the second sweep reads again:
// forward 5, backward 8. spatial_softmax_gate_launch.h chooses.
//
// The order of every sum depends on sizes alone: lanes of a team or block in a fixed tree, chunks by number.
#pragma once

#include <limits>

#include "cuda/map_vectors.cuh"
#include "cuda/spatial_softmax_gate_launch.h"

namespace cotnet {

// Forward: t is s, or null for zeros, and out is y. Backward: t is grad_y, out is grad_x.
template <class scalar_t>
struct GateMaps {
  const scalar_t* x;
  const scalar_t* v;
  const scalar_t* t;
  scalar_t* out;
  scalar_t* grad_v;  // or null

  // The same from element `at` on.
  COTNET_DEVICE GateMaps from(int64_t at) const {
    return {x + at, v + at, t ? t + at : nullptr, out + at, grad_v ? grad_v + at : nullptr};
  }
};

template <class acc>
constexpr acc kLowest = std::numeric_limits<acc>::lowest();

// The softmax of one row: maximum, sum of exp(x - top), sum of exp(x - top)*grad_y*v. Once `normalise`d, 1/sum in place of
// sum and the sum of p*grad_y*v in place of dot. Starting at the lowest number, not at -inf, keeps x - top defined where all
// of x is -inf; then 1/sum is infinite and the row NaN.
template <class acc>
struct SoftmaxSums {
  acc top, sum, dot;

  static COTNET_DEVICE SoftmaxSums none() {
    return {kLowest<acc>, acc(0), acc(0)};
  }
  COTNET_DEVICE void raise(acc new_top) {
    const acc shrink = fast_exponential(top - new_top);
    top = new_top;
    sum *= shrink;
    dot *= shrink;
  }
  COTNET_DEVICE void merge(SoftmaxSums other) {
    const acc most = maximum(top, other.top);
    raise(most);
    other.raise(most);
    sum += other.sum;
    dot += other.dot;
  }
  COTNET_DEVICE SoftmaxSums normalised() const {
    const acc scale = acc(1) / sum;
    return {top, scale, dot * scale};
  }
};

// `count` sums that lie `stride` apart, in order.
template <class acc>
COTNET_DEVICE SoftmaxSums<acc> merge_list(const SoftmaxSums<acc>* list, int count, int stride) {
  SoftmaxSums<acc> total = SoftmaxSums<acc>::none();
  for (int i = 0; i < count; ++i) total.top = maximum(total.top, list[i * stride].top);
  for (int i = 0; i < count; ++i) {
    const SoftmaxSums<acc> next = list[i * stride];
    const acc shrink = fast_exponential(next.top - total.top);
    total.sum = fma(next.sum, shrink, total.sum);
    total.dot = fma(next.dot, shrink, total.dot);
  }
  return total;
}

// The three maps of one vector of a thread.
template <class scalar_t>
struct GateVectors {
  MapPack<scalar_t> x, v, t;
};

// Results of element i, from exp's argument on.
template <bool kBackward, class scalar_t>
COTNET_DEVICE void gate_element(GateVectors<scalar_t>& in, int i, const SoftmaxSums<acc_t<scalar_t>>& row, bool wants_v) {
  using acc = acc_t<scalar_t>;
  const acc p = fast_exponential(widen(in.x.at[i]) - row.top) * row.sum;
  const acc v = widen(in.v.at[i]), t = widen(in.t.at[i]);
  if constexpr (kBackward) {
    in.x.at[i] = narrow<scalar_t>(p * (t * v - row.dot));
    if (wants_v) in.v.at[i] = narrow<scalar_t>(p * t);
  } else {
    in.x.at[i] = narrow<scalar_t>(fma(p, v, t));
  }
}

// Loads v and t of a batch of slots; a null t stays zero.
template <int kCount, class Slot, class scalar_t>
COTNET_DEVICE void load_v_and_t(const GateMaps<scalar_t>& maps, const Slot* slots, GateVectors<scalar_t>* in) {
  COTNET_UNROLL
  for (int b = 0; b < kCount; ++b) {
    in[b].v = load_slot(maps.v, slots[b]);
    in[b].t = load_vec_if<kMapVector<scalar_t>>(maps.t ? maps.t + slots[b].at : maps.v, maps.t && slots[b].whole());
  }
}
template <int kCount, class Slot, class scalar_t>
COTNET_DEVICE void mend_v_and_t(const GateMaps<scalar_t>& maps, const Slot* slots, GateVectors<scalar_t>* in) {
  const scalar_t zero = narrow<scalar_t>(acc_t<scalar_t>(0));
  COTNET_UNROLL
  for (int b = 0; b < kCount; ++b) {
    mend_slot(in[b].v, maps.v, slots[b], zero);
    if (maps.t) mend_slot(in[b].t, maps.t, slots[b], zero);
  }
}
template <bool kBackward, class Slot, class scalar_t>
COTNET_DEVICE void store_results(const GateMaps<scalar_t>& maps, const Slot& slot, const GateVectors<scalar_t>& results) {
  store_slot(maps.out, slot, results.x);
  if (kBackward && maps.grad_v) store_slot(maps.grad_v, slot, results.v);
}

// ---- short rows ------------------------------------------------------------------------------------------------------------

// Shared memory of a tile. Elements are counted from the tile's first vector, which may begin before the first row.
template <class scalar_t, bool kBackward>
struct GateTileMemory {
  using acc = acc_t<scalar_t>;
  MapPack<scalar_t>* x;   // [vectors]
  acc* product;           // [vectors, elements] grad_y*v, backward only
  SoftmaxSums<acc>* part; // [threads] of a team
  SoftmaxSums<acc>* row;  // [rows, and up to a vector more that are read but not used]

  COTNET_DEVICE explicit GateTileMemory(unsigned char* memory) {
    const int vectors = int(blockDim.x) * kGateTileItems;
    x = reinterpret_cast<MapPack<scalar_t>*>(memory);
    product = reinterpret_cast<acc*>(x + vectors);
    part = reinterpret_cast<SoftmaxSums<acc>*>(product + (kBackward ? vectors * kMapVector<scalar_t> : 0));
    row = part + blockDim.x;
  }
};

// The sums of elements first, first + step, ... below end, which lie in one row, by one lane; then those of its team.
template <bool kBackward, class scalar_t>
COTNET_DEVICE SoftmaxSums<acc_t<scalar_t>> sum_row(const GateTileMemory<scalar_t, kBackward>& memory, int first, int end, int step, int team) {
  using acc = acc_t<scalar_t>;
  const scalar_t* const x = memory.x->at;
  SoftmaxSums<acc> sums = SoftmaxSums<acc>::none();
  for (int e = first; e < end; e += step) sums.top = maximum(sums.top, widen(x[e]));
  for (int d = team / 2; d > 0; d /= 2) sums.top = maximum(sums.top, shuffle_xor(kAllLanes, sums.top, d));
  for (int e = first; e < end; e += step) {
    const acc share = fast_exponential(widen(x[e]) - sums.top);
    sums.sum += share;
    if (kBackward) sums.dot = fma(share, memory.product[e], sums.dot);
  }
  for (int d = team / 2; d > 0; d /= 2) {
    sums.sum += shuffle_xor(kAllLanes, sums.sum, d);
    if (kBackward) sums.dot += shuffle_xor(kAllLanes, sums.dot, d);
  }
  return sums;
}

// Softmax of the tile's rows into memory.row, by teams: the threads of a block are rows x teams of a row x lanes of a team.
template <bool kBackward, class scalar_t>
COTNET_DEVICE void sum_tile_rows(const GateTileMemory<scalar_t, kBackward>& memory, const GatePlan& plan, int first, int rows) {
  const int thread = int(threadIdx.x), team = thread / plan.team, lane = thread % plan.team;
  const int row = team / plan.teams_per_row, part = team % plan.teams_per_row, plane = int(plan.plane);
  const int begin = row < rows ? first + row * plane : 0, end = row < rows ? begin + plane : 0;
  const auto sums = sum_row(memory, begin + part * plan.team + lane, end, plan.teams_per_row * plan.team, plan.team);
  if (plan.teams_per_row == 1) {
    if (lane == 0 && row < rows) memory.row[row] = sums.normalised();
  } else {
    if (lane == 0) memory.part[team] = sums;
    sync_block();
    if (thread < rows) memory.row[thread] = merge_list(memory.part + thread * plan.teams_per_row, plan.teams_per_row, 1).normalised();
  }
  sync_block();
}

// A block has rows_per_block rows, one after the other in memory; a thread has kGateTileItems vectors of all maps in its
// registers, loaded before anything waits. Rows need not begin at a vector: they are summed through shared memory.
template <class scalar_t, bool kBackward>
COTNET_KERNEL(kGateTileThreads, sizeof(scalar_t) == 8 ? 1 : 2)
spatial_softmax_gate_tile_kernel(const GateMaps<scalar_t> all /* [rows, plane] */, const GatePlan plan) {
  using acc = acc_t<scalar_t>;
  constexpr int kItems = kGateTileItems, kVector = kMapVector<scalar_t>;
  COTNET_SHARED_DYNAMIC(shared);
  const GateTileMemory<scalar_t, kBackward> memory(shared);
  const int64_t first_row = unit_number() * plan.rows_per_block, left = plan.rows - first_row;
  if (left <= 0) return;
  const int rows = left < plan.rows_per_block ? int(left) : plan.rows_per_block;
  const PlaneVectors<scalar_t> vectors(first_row * plan.plane, (first_row + rows) * plan.plane, plan.aligned);

  const GateMaps<scalar_t> maps = all.from(vectors.origin);
  MapSlot<int> slots[kItems];
  GateVectors<scalar_t> in[kItems];
  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) {
    slots[k] = vectors.slot(k);
    in[k].x = load_slot(maps.x, slots[k]);
  }
  load_v_and_t<kItems>(maps, slots, in);
  mend_v_and_t<kItems>(maps, slots, in);
  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) {
    mend_slot(in[k].x, maps.x, slots[k], minus_infinity<scalar_t>());
    const int at = k * int(blockDim.x) + int(threadIdx.x);
    memory.x[at] = in[k].x;
    if constexpr (kBackward)
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) memory.product[at * kVector + i] = widen(in[k].t.at[i]) * widen(in[k].v.at[i]);
  }
  sync_block();
  sum_tile_rows(memory, plan, vectors.first, rows);

  const int plane = int(plan.plane);
  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int at = k * int(blockDim.x) + int(threadIdx.x), element = at * kVector - vectors.first;  // from the first row on
    if (element >= rows * plane) continue;
    in[k].x = memory.x[at];  // its registers served others in between
    int row = element < 0 ? 0 : int(unsigned(element) / unsigned(plane)), left_in_row = plane - (element - row * plane);
    SoftmaxSums<acc> sums = memory.row[row];
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      gate_element<kBackward>(in[k], i, sums, maps.grad_v);
      if (--left_in_row == 0) {
        left_in_row = plane;
        sums = memory.row[++row];
      }
    }
    store_results<kBackward>(maps, slots[k], in[k]);
  }
}

// ---- long rows, and channels_last ------------------------------------------------------------------------------------------

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
COTNET_DEVICE void gather(const GateMaps<scalar_t>& maps, const Vectors& vectors, const KeptVectors<scalar_t, kBackward>& kept,
                          SoftmaxSums<acc_t<scalar_t>>* sums) {
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
COTNET_DEVICE void finish(const GateMaps<scalar_t>& maps, const Vectors& vectors, const KeptVectors<scalar_t, kBackward>& kept,
                          const SoftmaxSums<acc_t<scalar_t>>* sums) {
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

// Merges the sums of the threads that share a row, and normalises: lanes of a warp first, then the warps in order.
// `memory` [warps + 1, lanes, kSums].
template <int kSums, class acc>
COTNET_DEVICE void merge_block(SoftmaxSums<acc>* sums, int lanes, SoftmaxSums<acc>* memory, bool normalise) {
  const int thread = int(threadIdx.x), lane = thread % lanes, warp = thread / 32, warps = int(blockDim.x) / 32, width = lanes * kSums;
  for (int d = lanes; d < 32; d *= 2)
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i) {
      const SoftmaxSums<acc> own = sums[i];
      sums[i].merge({shuffle_xor(kAllLanes, own.top, d), shuffle_xor(kAllLanes, own.sum, d), shuffle_xor(kAllLanes, own.dot, d)});
    }
  if (thread % 32 < lanes)
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i) memory[warp * width + lane * kSums + i] = sums[i];
  sync_block();
  SoftmaxSums<acc>* const total = memory + warps * width;
  for (int i = thread; i < width; i += int(blockDim.x)) {
    const SoftmaxSums<acc> merged = merge_list(memory + i, warps, width);
    total[i] = normalise ? merged.normalised() : merged;
  }
  sync_block();
  COTNET_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = total[lane * kSums + i];
}

// The vectors of this block: a chunk of a row, or of a slab of channels of an image.
template <class scalar_t>
COTNET_DEVICE PlaneVectors<scalar_t> vectors_of(const PlaneVectors<scalar_t>*, const GatePlan& plan, int64_t unit, int64_t chunk) {
  const int64_t begin = chunk * plan.chunk, end = begin + plan.chunk < plan.plane ? begin + plan.chunk : plan.plane;
  return {unit * plan.plane + begin, unit * plan.plane + end, plan.aligned};
}
template <class scalar_t>
COTNET_DEVICE ImageVectors<scalar_t> vectors_of(const ImageVectors<scalar_t>*, const GatePlan& plan, int64_t unit, int64_t chunk) {
  const int64_t image = unit / plan.slabs, begin = chunk * plan.chunk;
  const int64_t left = plan.plane - begin, pixels = left < plan.chunk ? left : plan.chunk;
  return {image * plan.plane * plan.channels, begin, int(pixels), plan.channels, unit % plan.slabs, plan.lanes, plan.aligned};
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
COTNET_DEVICE SoftmaxSums<acc>* partial_of(SoftmaxSums<acc>* partial, const Vectors& vectors, const GatePlan& plan, int64_t unit,
                                           int64_t chunk) {
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

// ---- launches --------------------------------------------------------------------------------------------------------------

template <class Vectors, int kThreads, bool kBackward, class scalar_t>
void launch_gate_sweeps(const GatePlan& plan, const GateMaps<scalar_t>& maps, SoftmaxSums<acc_t<scalar_t>>* partial, Stream stream) {
  if (plan.path == GatePath::kWhole) {
    launch_kernel(spatial_softmax_gate_whole_kernel<Vectors, kThreads, kBackward, scalar_t>, plan.launch, stream, maps, plan);
    return;
  }
  launch_kernel(spatial_softmax_gate_gather_kernel<Vectors, kBackward, scalar_t>, plan.launch, stream, maps, partial, plan);
  launch_kernel(spatial_softmax_gate_finish_kernel<Vectors, kBackward, scalar_t>, plan.launch, stream, maps, partial, plan);
}

// `partial` has plan.partial_sums() numbers.
template <bool kBackward, class scalar_t>
void launch_gate(const GatePlan& plan, const GateMaps<scalar_t>& maps, acc_t<scalar_t>* partial, Stream stream) {
  auto* const sums = reinterpret_cast<SoftmaxSums<acc_t<scalar_t>>*>(partial);
  if (plan.path == GatePath::kTile)
    launch_kernel(spatial_softmax_gate_tile_kernel<scalar_t, kBackward>, plan.launch, stream, maps, plan);
  else if (plan.channels_last)
    launch_gate_sweeps<ImageVectors<scalar_t>, kGateImageThreads, kBackward>(plan, maps, sums, stream);
  else
    launch_gate_sweeps<PlaneVectors<scalar_t>, kGateRowThreads, kBackward>(plan, maps, sums, stream);
}

template <class scalar_t>
void spatial_softmax_gate_forward_launch(const GatePlan& plan, const scalar_t* x, const scalar_t* v, const scalar_t* s, scalar_t* y,
                                         acc_t<scalar_t>* partial, Stream stream) {
  launch_gate<false>(plan, GateMaps<scalar_t>{x, v, s, y, nullptr}, partial, stream);
}

// Either gradient may be null. grad_v alone, p*grad_y, is a forward pass with grad_y in place of v and no s: `plan` must be
// of the forward pass then.
template <class scalar_t>
void spatial_softmax_gate_backward_launch(const GatePlan& plan, const scalar_t* grad_y, const scalar_t* x, const scalar_t* v,
                                          scalar_t* grad_x, scalar_t* grad_v, acc_t<scalar_t>* partial, Stream stream) {
  if (grad_x)
    launch_gate<true>(plan, GateMaps<scalar_t>{x, v, grad_y, grad_x, grad_v}, partial, stream);
  else if (grad_v)
    launch_gate<false>(plan, GateMaps<scalar_t>{x, grad_y, nullptr, grad_v, nullptr}, partial, stream);
}

}  // namespace cotnet
