// spatial_softmax_gate for short rows, NCHW: every byte is read once, before anything waits.
#pragma once

#include "cuda/spatial_softmax_gate_common.cuh"

namespace cotnet {

// Shared memory of a tile. Elements are counted from the tile's first vector, which may begin before the first row.
template <class scalar_t, bool kBackward>
struct GateTileMemory {
  using acc = acc_t<scalar_t>;
  MapPack<scalar_t>* x;    // [vectors]
  acc* product;            // [vectors, elements] grad_y*v, backward of several rows only
  SoftmaxSums<acc>* part;  // [threads] of a team
  SoftmaxSums<acc>* row;   // [rows, and up to a vector more that are read but not used]

  COTNET_DEVICE GateTileMemory(unsigned char* memory, bool several_rows) {
    const int vectors = int(blockDim.x) * kGateTileItems;
    x = reinterpret_cast<MapPack<scalar_t>*>(memory);
    product = reinterpret_cast<acc*>(x + vectors);
    part = reinterpret_cast<SoftmaxSums<acc>*>(product + (kBackward && several_rows ? vectors * kMapVector<scalar_t> : 0));
    row = part + blockDim.x;
  }
};

// The maximum and the sums of a team's lanes, in all of them.
template <class acc>
COTNET_DEVICE acc team_top(acc top, int team) {
  for (int d = team / 2; d > 0; d /= 2) top = maximum(top, shuffle_xor(kAllLanes, top, d));
  return top;
}
template <bool kBackward, class acc>
COTNET_DEVICE void sum_team(SoftmaxSums<acc>& sums, int team) {
  for (int d = team / 2; d > 0; d /= 2) {
    sums.sum += shuffle_xor(kAllLanes, sums.sum, d);
    if (kBackward) sums.dot += shuffle_xor(kAllLanes, sums.dot, d);
  }
}

// A warp's part of the only row, from the registers of its lanes.
template <bool kBackward, class scalar_t>
COTNET_DEVICE SoftmaxSums<acc_t<scalar_t>> sum_registers(const GateVectors<scalar_t>* in) {
  using acc = acc_t<scalar_t>;
  SoftmaxSums<acc> sums = SoftmaxSums<acc>::none();
  COTNET_UNROLL
  for (int k = 0; k < kGateTileItems; ++k)
    COTNET_UNROLL
    for (int i = 0; i < kMapVector<scalar_t>; ++i) sums.top = maximum(sums.top, widen(in[k].x.at[i]));
  sums.top = team_top(sums.top, 32);
  COTNET_UNROLL
  for (int k = 0; k < kGateTileItems; ++k)
    COTNET_UNROLL
    for (int i = 0; i < kMapVector<scalar_t>; ++i) {
      const acc share = fast_exponential(widen(in[k].x.at[i]) - sums.top);
      sums.sum += share;
      if (kBackward) sums.dot = fma(share, widen(in[k].t.at[i]) * widen(in[k].v.at[i]), sums.dot);
    }
  sum_team<kBackward>(sums, 32);
  return sums;
}

// A team's part of a row: elements first, first + step, ... below end are this lane's. Every thread must come here.
template <bool kBackward, class scalar_t>
COTNET_DEVICE SoftmaxSums<acc_t<scalar_t>> sum_elements(const GateTileMemory<scalar_t, kBackward>& memory, int first,
                                                        int end, int step, int team) {
  using acc = acc_t<scalar_t>;
  const scalar_t* const x = memory.x->at;
  SoftmaxSums<acc> sums = SoftmaxSums<acc>::none();
  COTNET_UNROLL_BY(4)
  for (int e = first; e < end; e += step) sums.top = maximum(sums.top, widen(x[e]));
  sums.top = team_top(sums.top, team);
  COTNET_UNROLL_BY(4)
  for (int e = first; e < end; e += step) {
    const acc share = fast_exponential(widen(x[e]) - sums.top);
    sums.sum += share;
    if (kBackward) sums.dot = fma(share, memory.product[e], sums.dot);
  }
  sum_team<kBackward>(sums, team);
  return sums;
}

// Softmax of the tile's rows into memory.row, by teams: the threads of a block are rows x teams of a row x lanes of a team.
template <bool kBackward, class scalar_t>
COTNET_DEVICE void sum_tile_rows(const GateTileMemory<scalar_t, kBackward>& memory, const GatePlan& plan,
                                 const GateVectors<scalar_t>* in, int first, int rows) {
  const int thread = int(threadIdx.x), team = thread >> plan.team_shift, lane = thread - (team << plan.team_shift);
  const int lanes = 1 << plan.team_shift, teams = plan.teams_per_row;
  if (plan.rows_per_block == 1) {
    const auto sums = sum_registers<kBackward>(in);
    if (lane == 0) memory.part[team] = sums;
  } else {
    const int row = teams == 1 ? team : team / teams, part = team - row * teams, plane = int(plan.plane);
    const int begin = row < rows ? first + row * plane : 0, end = row < rows ? begin + plane : 0;
    const auto sums = sum_elements(memory, begin + part * lanes + lane, end, teams * lanes, lanes);
    if (lane == 0) memory.part[team] = sums;
  }
  sync_block();
  if (thread < rows) memory.row[thread] = merge_list(memory.part + thread * teams, teams, 1).normalised();
  sync_block();
}

// Results of a vector that begins with the `element`-th element of the tile's rows (before the first of them if negative).
template <bool kBackward, class scalar_t>
COTNET_DEVICE void finish_vector(GateVectors<scalar_t>& in, const SoftmaxSums<acc_t<scalar_t>>* rows, int element,
                                 const GatePlan& plan, int plane, bool wants_v) {
  using Sums = SoftmaxSums<acc_t<scalar_t>>;
  constexpr int kVector = kMapVector<scalar_t>;
  if (plan.rows_per_block == 1) {
    const Sums sums = rows[0];
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) gate_element<kBackward>(in, i, sums, wants_v);
    return;
  }
  int row = element < 0 ? 0 : int(unsigned(element) / unsigned(plane)), left = plane - (element - row * plane);
  if (plane >= kVector) {  // elements of two rows at most
    const Sums first = rows[row], second = left < kVector ? rows[row + 1] : first;
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) gate_element<kBackward>(in, i, i < left ? first : second, wants_v);
    return;
  }
  Sums sums = rows[row];
  COTNET_UNROLL
  for (int i = 0; i < kVector; ++i) {
    gate_element<kBackward>(in, i, sums, wants_v);
    if (--left == 0) {
      left = plane;
      sums = rows[++row];
    }
  }
}

// A block has rows_per_block rows, one after the other in memory; a thread has kGateTileItems vectors of all maps in its
// registers, loaded before anything waits. Rows need not begin at a vector: they are summed through shared memory.
template <class scalar_t, bool kBackward>
COTNET_KERNEL(kGateTileThreads, sizeof(scalar_t) == 8 ? 1 : 2)
spatial_softmax_gate_tile_kernel(const GateMaps<scalar_t> all /* [rows, plane] */, const GatePlan plan) {
  constexpr int kItems = kGateTileItems, kVector = kMapVector<scalar_t>;
  COTNET_SHARED_DYNAMIC(shared);
  const GateTileMemory<scalar_t, kBackward> memory(shared, plan.rows_per_block > 1);
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
    if (kBackward && plan.rows_per_block > 1)
      COTNET_UNROLL
      for (int i = 0; i < kVector; ++i) memory.product[at * kVector + i] = widen(in[k].t.at[i]) * widen(in[k].v.at[i]);
  }
  sync_block();
  sum_tile_rows(memory, plan, in, vectors.first, rows);

  const int plane = int(plan.plane);
  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int at = k * int(blockDim.x) + int(threadIdx.x), element = at * kVector - vectors.first;  // from the first row on
    if (element >= rows * plane) continue;
    in[k].x = memory.x[at];  // its registers served others in between
    finish_vector<kBackward>(in[k], memory.row, element, plan, plane, maps.grad_v);
    store_results<kBackward>(maps, vectors.slot(k), in[k]);
  }
}

}  // namespace cotnet
