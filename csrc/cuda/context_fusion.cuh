// context_fusion and its gradients: with (p0, p1) = softmax of the two logits of a channel,
//     y = p0*d + p1*s        grad_d = p0*grad_y        grad_s = p1*grad_y
//     grad_logits = (u, -u) with u = p0*p1 * sum over the map of grad_y*(d - s)
//
// Bytes, in maps: forward reads d, s and writes y, 3; backward reads grad_y, d, s and writes grad_d, grad_s, 5. All maps are
// read and written once. Sums run in an order that depends on sizes alone.
#pragma once

#include "cuda/context_fusion_launch.h"
#include "cuda/map_vectors.cuh"

namespace cotnet {

// Forward: out is y. Backward: out is grad_d. What is not wanted is null.
template <class scalar_t>
struct FusionMaps {
  const scalar_t* d;
  const scalar_t* s;
  const scalar_t* grad_y;
  const scalar_t* logits;  // [N, C, 2]
  scalar_t* out;
  scalar_t* grad_s;
  scalar_t* grad_logits;     // [N, C, 2]
  acc_t<scalar_t>* partial;  // sums of chunks, or null if there is one: [N, C, chunks], channels_last [N, chunks, C]

  // The maps from element `at` on; what belongs to rows stays.
  COTNET_DEVICE FusionMaps from(int64_t at) const {
    FusionMaps maps = *this;
    maps.d += at;
    maps.s += at;
    if (grad_y) maps.grad_y += at;
    if (out) maps.out += at;
    if (grad_s) maps.grad_s += at;
    return maps;
  }
};

template <class acc>
struct FusionWeights {
  acc d, s;  // p0, p1
};

template <class scalar_t>
COTNET_DEVICE FusionWeights<acc_t<scalar_t>> weights_of(const scalar_t* logits, int64_t row) {
  using acc = acc_t<scalar_t>;
  acc a = load_wide(logits + 2 * row), b = load_wide(logits + 2 * row + 1);
  const acc top = maximum(a, b);
  a = exponential(a - top);
  b = exponential(b - top);
  const acc scale = acc(1) / (a + b);
  return {a * scale, b * scale};
}

// `sum` of grad_y*(d - s) over the map of `row`.
template <class scalar_t>
COTNET_DEVICE void write_grad_logits(const FusionMaps<scalar_t>& maps, int64_t row, acc_t<scalar_t> sum) {
  const FusionWeights<acc_t<scalar_t>> p = weights_of(maps.logits, row);
  const acc_t<scalar_t> u = p.d * p.s * sum;
  store_narrow(maps.grad_logits + 2 * row, u);
  store_narrow(maps.grad_logits + 2 * row + 1, -u);
}

// The maps of one vector of a thread.
template <class scalar_t>
struct FusionVectors {
  MapPack<scalar_t> d, s, g;
};

// Forward needs d and s, backward grad_y, and d and s for the gradient of the logits. In two parts: see load_slot.
template <bool kBackward, int kCount, class Slot, class scalar_t>
COTNET_DEVICE void load_maps(const FusionMaps<scalar_t>& maps, const Slot* slots, FusionVectors<scalar_t>* in) {
  const bool both = !kBackward || maps.grad_logits;
  COTNET_UNROLL
  for (int b = 0; b < kCount; ++b) {
    in[b].d = load_vec_if<kMapVector<scalar_t>>(maps.d + slots[b].at, both && slots[b].whole());
    in[b].s = load_vec_if<kMapVector<scalar_t>>(maps.s + slots[b].at, both && slots[b].whole());
    if (kBackward) in[b].g = load_slot(maps.grad_y, slots[b]);
  }
  const scalar_t zero = narrow<scalar_t>(acc_t<scalar_t>(0));
  COTNET_UNROLL
  for (int b = 0; b < kCount; ++b) {
    if (both) mend_slot(in[b].d, maps.d, slots[b], zero);
    if (both) mend_slot(in[b].s, maps.s, slots[b], zero);
    if (kBackward) mend_slot(in[b].g, maps.grad_y, slots[b], zero);
  }
}

// Element i's results, in place: y or grad_d in d, grad_s in s. Returns grad_y*(d - s).
template <bool kBackward, class scalar_t>
COTNET_DEVICE acc_t<scalar_t> fuse_element(FusionVectors<scalar_t>& in, int i, const FusionWeights<acc_t<scalar_t>>& p) {
  using acc = acc_t<scalar_t>;
  const acc d = widen(in.d.at[i]), s = widen(in.s.at[i]);
  if constexpr (!kBackward) {
    in.d.at[i] = narrow<scalar_t>(fma(p.d, d, p.s * s));
    return acc(0);
  } else {
    const acc g = widen(in.g.at[i]);
    in.d.at[i] = narrow<scalar_t>(p.d * g);
    in.s.at[i] = narrow<scalar_t>(p.s * g);
    return g * (d - s);
  }
}

template <bool kBackward, class Slot, class scalar_t>
COTNET_DEVICE void store_fused(const FusionMaps<scalar_t>& maps, const Slot& slot, const FusionVectors<scalar_t>& results) {
  if (maps.out) store_slot(maps.out, slot, results.d);
  if (kBackward && maps.grad_s) store_slot(maps.grad_s, slot, results.s);
}

// ---- NCHW -------------------------------------------------------------------------------------------------

template <class scalar_t, bool kBackward>
constexpr int kFusionItems = kBackward ? kFusionBackwardItems : kFusionForwardItems;

// Shared memory of a block.
template <class scalar_t, bool kBackward>
struct FusionMemory {
  using acc = acc_t<scalar_t>;
  acc* product;             // backward: grad_y*(d - s) of all elements, from the block's first vector on
  acc* part;                // [threads] sums of teams
  FusionWeights<acc>* row;  // [rows, and up to a vector more that are read but not used]

  COTNET_DEVICE explicit FusionMemory(unsigned char* memory) {
    product = reinterpret_cast<acc*>(memory);
    part = product + (kBackward ? int(blockDim.x) * kFusionItems<scalar_t, kBackward> * kMapVector<scalar_t> : 0);
    row = reinterpret_cast<FusionWeights<acc>*>(part + blockDim.x);
  }
};

// Adds up the products of each row by teams: the threads of a block are rows x teams of a row x lanes of a team.
template <class scalar_t>
COTNET_DEVICE void sum_products(const FusionMaps<scalar_t>& maps, const FusionMemory<scalar_t, true>& memory,
                                const FusionPlan& plan, int64_t first_row, int rows, int first, int length) {
  using acc = acc_t<scalar_t>;
  const int thread = int(threadIdx.x), team = thread / plan.team, lane = thread % plan.team;
  const int row = team / plan.teams_per_row, part = team % plan.teams_per_row;
  const int begin = row < rows ? first + row * length : 0, end = row < rows ? begin + length : 0;
  acc sum = 0;
  for (int e = begin + part * plan.team + lane; e < end; e += plan.teams_per_row * plan.team) sum += memory.product[e];
  for (int d = plan.team / 2; d > 0; d /= 2) sum += shuffle_xor(kAllLanes, sum, d);
  if (lane == 0) memory.part[team] = sum;
  sync_block();
  if (thread >= rows) return;
  acc total = 0;
  for (int i = 0; i < plan.teams_per_row; ++i) total += memory.part[thread * plan.teams_per_row + i];
  if (maps.partial)
    maps.partial[(first_row + thread) * plan.chunks + blockIdx.x] = total;
  else
    write_grad_logits(maps, first_row + thread, total);
}

// A block has rows_per_block planes, one after the other in memory, or a chunk of one plane; a thread has some vectors of
// all maps in its registers. Planes need not begin at a vector.
template <class scalar_t, bool kBackward>
COTNET_KERNEL(kFusionThreads, 3)
context_fusion_planes_kernel(const FusionMaps<scalar_t> all /* [N, C, H, W] */, const FusionPlan plan) {
  using acc = acc_t<scalar_t>;
  constexpr int kItems = kFusionItems<scalar_t, kBackward>, kVector = kMapVector<scalar_t>;
  COTNET_SHARED_DYNAMIC(shared);
  const FusionMemory<scalar_t, kBackward> memory(shared);
  const int64_t first_row = unit_number() * plan.rows_per_block, left = plan.rows - first_row;
  if (left <= 0) return;
  const int rows = left < plan.rows_per_block ? int(left) : plan.rows_per_block;
  const int64_t begin = blockIdx.x * plan.chunk, left_of_plane = plan.plane - begin;
  const int length = int(left_of_plane < plan.chunk ? left_of_plane : plan.chunk);  // of each row
  const int64_t from = first_row * plan.plane + begin;
  const PlaneVectors<scalar_t> vectors(from, from + int64_t(rows) * length, plan.aligned);

  const FusionMaps<scalar_t> maps = all.from(vectors.origin);
  MapSlot<int> slots[kItems];
  FusionVectors<scalar_t> in[kItems];
  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) slots[k] = vectors.slot(k);
  load_maps<kBackward, kItems>(maps, slots, in);
  if (int(threadIdx.x) < rows) memory.row[threadIdx.x] = weights_of(maps.logits, first_row + int(threadIdx.x));
  sync_block();

  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int at = (k * int(blockDim.x) + int(threadIdx.x)) * kVector, element = at - vectors.first;  // from the rows' begin
    if (element >= rows * length) continue;
    int row = element < 0 ? 0 : int(unsigned(element) / unsigned(length)), left_in_row = length - (element - row * length);
    FusionWeights<acc> p = memory.row[row];
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const acc product = fuse_element<kBackward>(in[k], i, p);
      if (kBackward && maps.grad_logits) memory.product[at + i] = product;
      if (--left_in_row == 0) {
        left_in_row = length;
        p = memory.row[++row];
      }
    }
    store_fused<kBackward>(maps, slots[k], in[k]);
  }
  if constexpr (kBackward) {
    if (!maps.grad_logits) return;
    sync_block();
    sum_products(maps, memory, plan, first_row, rows, vectors.first, length);
  }
}

// ---- channels_last ----------------------------------------------------------------------------------------

// Merges the sums of the threads that share channels: lanes of a warp first, then the warps in order. One thread for each
// channel of the slab then has its total. `memory` [warps, lanes, kVector].
template <class scalar_t>
COTNET_DEVICE void sum_slab(const FusionMaps<scalar_t>& maps, const FusionPlan& plan, int64_t image, int64_t slab,
                            acc_t<scalar_t>* sums, acc_t<scalar_t>* memory) {
  using acc = acc_t<scalar_t>;
  constexpr int kVector = kMapVector<scalar_t>;
  const int thread = int(threadIdx.x), lane = thread & (plan.lanes - 1), warps = int(blockDim.x) / 32;
  const int width = plan.lanes * kVector;
  for (int d = plan.lanes; d < 32; d *= 2)
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) sums[i] += shuffle_xor(kAllLanes, sums[i], d);
  if (thread % 32 < plan.lanes)
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) memory[thread / 32 * width + lane * kVector + i] = sums[i];
  sync_block();
  for (int i = thread; i < width; i += int(blockDim.x)) {
    const int64_t channel = slab * width + i;
    if (channel >= plan.channels) return;
    acc total = 0;
    for (int warp = 0; warp < warps; ++warp) total += memory[warp * width + i];
    if (maps.partial)
      maps.partial[(image * plan.chunks + blockIdx.x) * plan.channels + channel] = total;
    else
      write_grad_logits(maps, image * plan.channels + channel, total);
  }
}

// A block has a slab of channels at a chunk of the pixels of an image; a thread one vector of channels at some of them.
template <class scalar_t, bool kBackward>
COTNET_KERNEL(kFusionThreads, 2)
context_fusion_images_kernel(const FusionMaps<scalar_t> maps /* [N, H, W, C] */, const FusionPlan plan) {
  using acc = acc_t<scalar_t>;
  constexpr int kCount = kBackward ? kFusionBatch / 2 : kFusionBatch, kVector = kMapVector<scalar_t>;
  COTNET_SHARED_DYNAMIC(shared);
  const int64_t unit = unit_number();
  if (unit >= plan.units) return;
  const int64_t image = unit / plan.slabs, slab = unit - image * plan.slabs, begin = blockIdx.x * plan.chunk;
  const int64_t left = plan.plane - begin;
  const int pixels = int(left < plan.chunk ? left : plan.chunk), width = plan.lanes * kVector;
  const ImageVectors<scalar_t> vectors(image * plan.plane * plan.channels, begin, pixels, plan.channels, slab, plan.lanes,
                                       plan.aligned);

  FusionWeights<acc>* const weights = reinterpret_cast<FusionWeights<acc>*>(shared);  // [width]
  for (int i = int(threadIdx.x); i < width; i += int(blockDim.x))
    if (slab * width + i < plan.channels) weights[i] = weights_of(maps.logits, image * plan.channels + slab * width + i);
  sync_block();
  FusionWeights<acc> p[kVector];
  acc sums[kVector];
  COTNET_UNROLL
  for (int i = 0; i < kVector; ++i) {
    p[i] = weights[vectors.lane() * kVector + i];
    sums[i] = 0;
  }
  const int steps = vectors.steps();
  for (int step = 0; step < steps; step += kCount) {
    MapSlot<int64_t> slots[kCount];
    FusionVectors<scalar_t> in[kCount];
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) slots[b] = vectors.slot(step + b);  // empty beyond the end
    load_maps<kBackward, kCount>(maps, slots, in);
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) {
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) sums[i] += fuse_element<kBackward>(in[b], i, p[i]);
      store_fused<kBackward>(maps, slots[b], in[b]);
    }
  }
  if constexpr (kBackward)
    if (maps.grad_logits) sum_slab(maps, plan, image, slab, sums, reinterpret_cast<acc*>(weights + width));
}

// ---- the sums of several chunks ---------------------------------------------------------------------------

// A warp has one channel of one image and adds up its chunks.
template <class scalar_t>
COTNET_KERNEL(128, 1)
context_fusion_grad_logits_kernel(const FusionMaps<scalar_t> maps, const FusionPlan plan) {
  using acc = acc_t<scalar_t>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t row = unit_number() * (blockDim.x / 32) + warp;
  if (row >= plan.rows) return;
  const int64_t image = row / plan.channels, channel = row - image * plan.channels;
  const int64_t first = plan.channels_last ? image * plan.chunks * plan.channels + channel : row * plan.chunks;
  const int64_t stride = plan.channels_last ? plan.channels : 1;
  acc sum = 0;
  for (int chunk = lane; chunk < plan.chunks; chunk += 32) sum += maps.partial[first + chunk * stride];
  for (int d = 16; d > 0; d /= 2) sum += shuffle_xor(kAllLanes, sum, d);
  if (lane == 0) write_grad_logits(maps, row, sum);
}

// ---- launches ---------------------------------------------------------------------------------------------

template <bool kBackward, class scalar_t>
void launch_fusion(const FusionPlan& plan, const FusionMaps<scalar_t>& maps, Stream stream) {
  if (plan.channels_last)
    launch_kernel(context_fusion_images_kernel<scalar_t, kBackward>, plan.launch, stream, maps, plan);
  else
    launch_kernel(context_fusion_planes_kernel<scalar_t, kBackward>, plan.launch, stream, maps, plan);
}

template <class scalar_t>
void context_fusion_forward_launch(const FusionPlan& plan, const scalar_t* d, const scalar_t* s, const scalar_t* logits,
                                   scalar_t* y, Stream stream) {
  launch_fusion<false>(plan, FusionMaps<scalar_t>{d, s, nullptr, logits, y, nullptr, nullptr, nullptr}, stream);
}

// Any gradient may be null. `partial` has plan.partial_sums() numbers where grad_logits is wanted.
template <class scalar_t>
void context_fusion_backward_launch(const FusionPlan& plan, const scalar_t* grad_y, const scalar_t* d, const scalar_t* s,
                                    const scalar_t* logits, scalar_t* grad_d, scalar_t* grad_s, scalar_t* grad_logits,
                                    acc_t<scalar_t>* partial, Stream stream) {
  if (!grad_d && !grad_s && !grad_logits) return;
  acc_t<scalar_t>* const sums = plan.chunks > 1 ? partial : nullptr;
  const FusionMaps<scalar_t> maps{d, s, grad_y, logits, grad_d, grad_s, grad_logits, sums};
  launch_fusion<true>(plan, maps, stream);
  if (grad_logits && plan.chunks != 1)  // the sum over a map without pixels is zero
    launch_kernel(context_fusion_grad_logits_kernel<scalar_t>, choose_context_fusion_grad_logits(plan), stream, maps, plan);
}

}  // namespace cotnet
