// Sweeps over maps [N, C, H*W]: every vector of the maps is read once, with coefficients of its channel and image at hand; a
// sweep may write maps, and may leave sums over each map. All of it in an order that depends on sizes alone.
//
// What a sweep does with an element is a struct, the pass:
//     kInputs, kOutputs                          maps that it reads and writes; outputs are no more than inputs
//     kNormRows, kOtherRows                      coefficients of a channel, from two tables
//     kImageRows, kPooledRows                    the same of a channel of an image, behind them
//     kSums
//     operator()(in, coefficients, out, sums)    the element of each map, widened; adds its terms to the sums
#pragma once

#include "cuda/map_sweep_launch.h"
#include "cuda/map_vectors.cuh"

namespace cotnet {

// What most passes have none of.
struct SweepPass {
  static constexpr int kOutputs = 0, kOtherRows = 0, kImageRows = 0, kPooledRows = 0, kSums = 0;
};

template <class Pass>
constexpr int kCoefficients = Pass::kNormRows + Pass::kOtherRows + Pass::kImageRows + Pass::kPooledRows;
template <class Pass>
constexpr int kCoefficientSlots = kCoefficients<Pass> > 0 ? kCoefficients<Pass> : 1;

template <class scalar_t, class Pass>
struct SweepMaps {
  const scalar_t* in[Pass::kInputs];
  scalar_t* out[Pass::kOutputs + 1];  // the last is nobody's

  COTNET_DEVICE SweepMaps from(int64_t at) const {
    SweepMaps maps = *this;
    COTNET_UNROLL
    for (int i = 0; i < Pass::kInputs; ++i) maps.in[i] += at;
    COTNET_UNROLL
    for (int i = 0; i < Pass::kOutputs; ++i) maps.out[i] += at;
    return maps;
  }
};

template <class acc>
struct SweepTables {
  const acc* norm;    // [kNormRows, C]
  const acc* other;   // [kOtherRows, C]
  const acc* image;   // [N, kImageRows, C]
  const acc* pooled;  // [N, kPooledRows, C]

  // Row q of all for image n.
  template <class Pass>
  COTNET_DEVICE const acc* row(int q, int64_t n, int64_t channels) const {
    if (q < Pass::kNormRows) return norm + q * channels;
    q -= Pass::kNormRows;
    if (q < Pass::kOtherRows) return other + q * channels;
    q -= Pass::kOtherRows;
    if (q < Pass::kImageRows) return image + (n * Pass::kImageRows + q) * channels;
    return pooled + (n * Pass::kPooledRows + q - Pass::kImageRows) * channels;
  }
};

// Sums [N, kinds, C], times `scale`; or those of chunks, [chunks, N, kinds, C].
template <class acc>
struct SweepSums {
  acc* to;
  acc scale;
  int64_t of_chunk;  // numbers of a chunk

  template <int kKinds>
  COTNET_DEVICE void write(int chunk, int64_t n, int kind, int64_t c, int64_t channels, acc sum) const {
    store_narrow(to + chunk * of_chunk + (n * kKinds + kind) * channels + c, sum * scale);
  }
};

template <int kMaps, class scalar_t>
struct MapPacks {
  MapPack<scalar_t> of[kMaps];
};
// In two parts: see load_slot.
template <int kCount, class Pass, class scalar_t, class Slot>
COTNET_DEVICE void load_maps(const SweepMaps<scalar_t, Pass>& maps, const Slot* slots, MapPacks<Pass::kInputs, scalar_t>* packs) {
  COTNET_UNROLL
  for (int k = 0; k < kCount; ++k)
    COTNET_UNROLL
    for (int i = 0; i < Pass::kInputs; ++i) packs[k].of[i] = load_slot(maps.in[i], slots[k]);
  const scalar_t zero = narrow<scalar_t>(acc_t<scalar_t>(0));
  COTNET_UNROLL
  for (int k = 0; k < kCount; ++k)
    COTNET_UNROLL
    for (int i = 0; i < Pass::kInputs; ++i) mend_slot(packs[k].of[i], maps.in[i], slots[k], zero);
}

// Element i of the maps; results take the place of the inputs.
template <class Pass, class scalar_t, class acc>
COTNET_DEVICE void sweep_element(const Pass& pass, MapPacks<Pass::kInputs, scalar_t>& packs, int i, const acc* coefficients,
                                 acc* sums) {
  acc in[Pass::kInputs], out[Pass::kOutputs + 1];
  COTNET_UNROLL
  for (int m = 0; m < Pass::kInputs; ++m) in[m] = widen(packs.of[m].at[i]);
  pass(in, coefficients, out, sums);
  COTNET_UNROLL
  for (int m = 0; m < Pass::kOutputs; ++m) packs.of[m].at[i] = narrow<scalar_t>(out[m]);
}

// ---- NCHW -------------------------------------------------------------------------------------------------

// The rows of a block: rows_per_block planes, one after the other in memory, or a chunk of one plane. A thread has some vectors
// of them; planes need not begin at a vector.
template <class scalar_t>
struct BlockRows {
  int64_t first;  // plane of all
  int rows, length;
  int64_t from;  // element of all
  static constexpr int kVector = kMapVector<scalar_t>;

  COTNET_DEVICE explicit BlockRows(const SweepPlan& plan) {
    first = unit_number() * plan.rows_per_block;
    const int64_t left = plan.rows - first, begin = blockIdx.x * plan.chunk, left_of_plane = plan.plane - begin;
    rows = left <= 0 ? 0 : left < plan.rows_per_block ? int(left) : plan.rows_per_block;
    length = int(left_of_plane < plan.chunk ? left_of_plane : plan.chunk);
    from = first * plan.plane + begin;
  }
  COTNET_DEVICE PlaneVectors<scalar_t> vectors(bool aligned) const { return {from, from + int64_t(rows) * length, aligned}; }

  // Calls enter(row) and then element(i) for the elements of vector k of this thread, and leave(piece) after those of each row;
  // the pieces of a vector are counted from zero. `skipped`: elements before the first.
  template <class Enter, class Element, class Leave>
  COTNET_DEVICE void each(int k, const MapSlot<int>& slot, int skipped, const Enter& enter, const Element& element,
                          const Leave& leave) const {
    const int at = (k * int(blockDim.x) + int(threadIdx.x)) * kVector - skipped;
    if (at >= rows * length) return;
    int row = at < 0 ? 0 : int(unsigned(at) / unsigned(length)), turn = (row + 1) * length - at, piece = 0;
    enter(row);
    COTNET_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (!slot.has(i)) continue;
      if (i == turn) {
        leave(piece++);
        enter(++row);
        turn += length;
      }
      element(i);
    }
    leave(piece);
  }
};

// Sums of rows, in shared memory: first those of the pieces of vectors, then of teams of lanes.
template <class scalar_t, int kSums>
class RowSums {
 public:
  using acc = acc_t<scalar_t>;

  COTNET_DEVICE RowSums(const SweepPlan& plan, int items, acc* memory)
      : plan_(plan), vectors_(int(blockDim.x) * items), pieces_(memory), teams_(memory + kSums * plan.pieces * vectors_) {}
  COTNET_DEVICE acc* end() const { return teams_ + int(blockDim.x) / plan_.team * kSums; }

  COTNET_DEVICE void keep(int k, int piece, const acc* sums) const {
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i)
      pieces_[(i * plan_.pieces + piece) * vectors_ + k * int(blockDim.x) + int(threadIdx.x)] = sums[i];
  }

  // Between barriers, by all threads: the threads of a block are rows x teams of a row x lanes of a team.
  COTNET_DEVICE void merge(const BlockRows<scalar_t>& block, int skipped) const {
    constexpr int kVector = kMapVector<scalar_t>;
    const int team = int(threadIdx.x) / plan_.team, lane = int(threadIdx.x) % plan_.team;
    const int row = team / plan_.teams_per_row, part = team % plan_.teams_per_row;
    const bool used = row < block.rows;
    const int begin = skipped + row * block.length, first = begin / kVector;
    const int end = used ? (begin + block.length - 1) / kVector + 1 : 0;
    const int before = first * kVector - skipped;  // its vector begins there, perhaps in another row
    const int piece = used ? row - (before < 0 ? 0 : before / block.length) : 0;
    acc sums[kSums] = {};
    for (int v = first + part * plan_.team + lane; v < end; v += plan_.teams_per_row * plan_.team)
      COTNET_UNROLL
      for (int i = 0; i < kSums; ++i) sums[i] += pieces_[(i * plan_.pieces + (v == first ? piece : 0)) * vectors_ + v];
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i) {
      for (int d = plan_.team / 2; d > 0; d /= 2) sums[i] += shuffle_xor(kAllLanes, sums[i], d);
      if (lane == 0) teams_[team * kSums + i] = sums[i];
    }
  }
  // After them, of any row.
  COTNET_DEVICE acc total(int row, int kind) const {
    acc sum = 0;
    for (int i = 0; i < plan_.teams_per_row; ++i) sum += teams_[(row * plan_.teams_per_row + i) * kSums + kind];
    return sum;
  }

 private:
  const SweepPlan& plan_;
  const int vectors_;
  acc* const pieces_;  // [kSums, pieces, vectors of the block]
  acc* const teams_;   // [teams, kSums]
};

template <class Pass>
constexpr int kSumSlots = Pass::kSums > 0 ? Pass::kSums : 1;

template <class scalar_t, class Pass>
COTNET_KERNEL(kSweepThreads, 3)
sweep_planes_kernel(const SweepMaps<scalar_t, Pass> all /* [N, C, H, W] */, const SweepTables<acc_t<scalar_t>> tables,
                    const SweepSums<acc_t<scalar_t>> results, const Pass pass, const SweepPlan plan) {
  using acc = acc_t<scalar_t>;
  constexpr int kItems = kSweepItems<Pass::kInputs>, kAll = kCoefficients<Pass>, kPitch = kAll | 1;
  COTNET_SHARED_DYNAMIC(shared);
  const BlockRows<scalar_t> block(plan);
  if (block.rows == 0) return;
  const PlaneVectors<scalar_t> vectors = block.vectors(plan.aligned);
  const SweepMaps<scalar_t, Pass> maps = all.from(vectors.origin);
  MapSlot<int> slots[kItems];
  MapPacks<Pass::kInputs, scalar_t> packs[kItems];
  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) slots[k] = vectors.slot(k);
  load_maps<kItems>(maps, slots, packs);

  const RowSums<scalar_t, Pass::kSums> sums_of_rows(plan, kItems, reinterpret_cast<acc*>(shared));
  acc* const coefficients = sums_of_rows.end();  // [rows, kPitch]
  const int64_t own = block.first + int(threadIdx.x), image = own / plan.channels, channel = own - image * plan.channels;
  const bool has_row = int(threadIdx.x) < block.rows;
  COTNET_UNROLL
  for (int q = 0; q < kAll; ++q)
    if (has_row)
      coefficients[int(threadIdx.x) * kPitch + q] = load_wide(tables.template row<Pass>(q, image, plan.channels) + channel);
  sync_block();

  COTNET_UNROLL
  for (int k = 0; k < kItems; ++k) {
    acc own_coefficients[kCoefficientSlots<Pass>], sums[kSumSlots<Pass>];
    const auto enter = [&](int row) {
      COTNET_UNROLL
      for (int q = 0; q < kAll; ++q) own_coefficients[q] = coefficients[row * kPitch + q];
      COTNET_UNROLL
      for (int i = 0; i < Pass::kSums; ++i) sums[i] = 0;
    };
    const auto element = [&](int i) { sweep_element(pass, packs[k], i, own_coefficients, sums); };
    block.each(k, slots[k], vectors.first, enter, element, [&](int piece) { sums_of_rows.keep(k, piece, sums); });
    COTNET_UNROLL
    for (int m = 0; m < Pass::kOutputs; ++m) store_slot(maps.out[m], slots[k], packs[k].of[m]);
  }
  if constexpr (Pass::kSums > 0) {
    sync_block();
    sums_of_rows.merge(block, vectors.first);
    sync_block();
    if (has_row)
      for (int i = 0; i < Pass::kSums; ++i)
        results.template write<Pass::kSums>(int(blockIdx.x), image, i, channel, plan.channels,
                                            sums_of_rows.total(int(threadIdx.x), i));
  }
}

// ---- channels_last ----------------------------------------------------------------------------------------

// The part of the maps that a block has: a slab of channels at a chunk of the pixels of an image.
template <class scalar_t>
struct BlockSlab {
  int64_t image, slab;
  int pixels, width;  // of channels
  static constexpr int kVector = kMapVector<scalar_t>;

  COTNET_DEVICE BlockSlab(const SweepPlan& plan, int64_t unit) {
    const int64_t left = plan.plane - blockIdx.x * plan.chunk;
    image = unit / plan.slabs;
    slab = unit - image * plan.slabs;
    pixels = int(left < plan.chunk ? left : plan.chunk);
    width = plan.lanes * kVector;
  }
  COTNET_DEVICE ImageVectors<scalar_t> vectors(const SweepPlan& plan) const {
    return {image * plan.plane * plan.channels, blockIdx.x * plan.chunk, pixels, plan.channels, slab, plan.lanes, plan.aligned};
  }
};

// Merges the sums of the threads that share channels: lanes of a warp first, then, after a barrier, the warps in order.
template <class scalar_t, int kSums>
class SlabSums {
 public:
  using acc = acc_t<scalar_t>;

  COTNET_DEVICE SlabSums(const SweepPlan& plan, acc* memory)
      : lanes_(plan.lanes), width_(plan.lanes * kVector), warps_(int(blockDim.x) / 32), memory_(memory) {}

  COTNET_DEVICE void keep(acc (&sums)[kSums][kMapVector<scalar_t>]) const {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) & (lanes_ - 1);
    COTNET_UNROLL
    for (int i = 0; i < kSums; ++i)
      COTNET_UNROLL
      for (int e = 0; e < kVector; ++e) {
        for (int d = lanes_; d < 32; d *= 2) sums[i][e] += shuffle_xor(kAllLanes, sums[i][e], d);
        if (int(threadIdx.x) % 32 < lanes_) memory_[(i * warps_ + warp) * width_ + lane * kVector + e] = sums[i][e];
      }
  }
  COTNET_DEVICE acc total(int kind, int channel) const {
    acc sum = 0;
    for (int warp = 0; warp < warps_; ++warp) sum += memory_[(kind * warps_ + warp) * width_ + channel];
    return sum;
  }

 private:
  static constexpr int kVector = kMapVector<scalar_t>;
  const int lanes_, width_, warps_;
  acc* const memory_;  // [kSums, warps, width]
};

// Blocks of a multiprocessor: what the registers for coefficients and sums of the channels of a vector leave room for.
template <class scalar_t, class Pass>
constexpr int kSweepState = (kCoefficients<Pass> + Pass::kSums) * kMapVector<scalar_t> * int(sizeof(acc_t<scalar_t>)) / 4;
template <class scalar_t, class Pass>
constexpr int kSweepImageBlocks = kSweepState<scalar_t, Pass> <= 24 ? 4 : 3;

template <class scalar_t, class Pass>
COTNET_KERNEL(kSweepImageThreads, (kSweepImageBlocks<scalar_t, Pass>))
sweep_images_kernel(const SweepMaps<scalar_t, Pass> maps /* [N, H, W, C] */, const SweepTables<acc_t<scalar_t>> tables,
                    const SweepSums<acc_t<scalar_t>> results, const Pass pass, const SweepPlan plan) {
  using acc = acc_t<scalar_t>;
  constexpr int kCount = kSweepBatch<Pass::kInputs>, kVector = kMapVector<scalar_t>, kAll = kCoefficients<Pass>;
  COTNET_SHARED_DYNAMIC(shared);
  const int64_t unit = unit_number();
  if (unit >= plan.units) return;
  const BlockSlab<scalar_t> block(plan, unit);
  const ImageVectors<scalar_t> vectors = block.vectors(plan);

  acc* const all_coefficients = reinterpret_cast<acc*>(shared);  // [kAll, width]
  for (int i = int(threadIdx.x); i < block.width; i += int(blockDim.x)) {
    const int64_t channel = block.slab * block.width + i;
    COTNET_UNROLL
    for (int q = 0; q < kAll; ++q)
      all_coefficients[q * block.width + i] =
          load_wide_if(tables.template row<Pass>(q, block.image, plan.channels) + channel, channel < plan.channels);
  }
  sync_block();
  acc coefficients[kVector][kCoefficientSlots<Pass>], sums[kSumSlots<Pass>][kVector];
  COTNET_UNROLL
  for (int e = 0; e < kVector; ++e) {
    COTNET_UNROLL
    for (int q = 0; q < kAll; ++q) coefficients[e][q] = all_coefficients[q * block.width + vectors.lane() * kVector + e];
    COTNET_UNROLL
    for (int i = 0; i < Pass::kSums; ++i) sums[i][e] = 0;
  }
  const int steps = vectors.steps();
  for (int step = 0; step < steps; step += kCount) {
    MapSlot<int64_t> slots[kCount];
    MapPacks<Pass::kInputs, scalar_t> packs[kCount];
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) slots[b] = vectors.slot(step + b);  // empty beyond the end
    load_maps<kCount>(maps, slots, packs);
    COTNET_UNROLL
    for (int b = 0; b < kCount; ++b) {
      COTNET_UNROLL
      for (int e = 0; e < kVector; ++e) {
        if (!slots[b].has(e)) continue;
        acc terms[kSumSlots<Pass>];
        COTNET_UNROLL
        for (int i = 0; i < Pass::kSums; ++i) terms[i] = sums[i][e];
        sweep_element(pass, packs[b], e, coefficients[e], terms);
        COTNET_UNROLL
        for (int i = 0; i < Pass::kSums; ++i) sums[i][e] = terms[i];
      }
      COTNET_UNROLL
      for (int m = 0; m < Pass::kOutputs; ++m) store_slot(maps.out[m], slots[b], packs[b].of[m]);
    }
  }
  if constexpr (Pass::kSums > 0) {
    const SlabSums<scalar_t, Pass::kSums> merged(plan, all_coefficients + kAll * block.width);
    merged.keep(sums);
    sync_block();
    for (int i = int(threadIdx.x); i < block.width; i += int(blockDim.x)) {
      const int64_t channel = block.slab * block.width + i;
      if (channel >= plan.channels) return;
      for (int kind = 0; kind < Pass::kSums; ++kind)
        results.template write<Pass::kSums>(int(blockIdx.x), block.image, kind, channel, plan.channels, merged.total(kind, i));
    }
  }
}

// ---- the sums of several chunks ---------------------------------------------------------------------------

constexpr int kSweepMergeThreads = 128;

// A thread has one sum and adds up its chunks.
template <class acc>
COTNET_KERNEL(kSweepMergeThreads, 1)
sweep_merge_kernel(const acc* partial /* [chunks, count] */, int chunks, int64_t count, double scale, acc* sums /* [count] */) {
  const int64_t at = int64_t(blockIdx.x) * kSweepMergeThreads + threadIdx.x;
  if (at >= count) return;
  double sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += double(load_wide(partial + chunk * count + at));
  store_narrow(sums + at, acc(sum * scale));
}

// ---- launches ---------------------------------------------------------------------------------------------

template <class Pass>
SweepNeeds needs_of() {
  return {kSweepItems<Pass::kInputs>, kSweepBatch<Pass::kInputs>, kSweepSteps, kCoefficients<Pass>, Pass::kSums};
}
template <class Pass, class scalar_t>
SweepPlan plan_of(const MapProblem& p, const SweepMaps<scalar_t, Pass>& maps, const DeviceNumbers& device) {
  bool aligned = true;
  for (int i = 0; i < Pass::kInputs; ++i) aligned = aligned && are_aligned({maps.in[i]});
  for (int i = 0; i < Pass::kOutputs; ++i) aligned = aligned && are_aligned({maps.out[i]});
  return choose_sweep(p, needs_of<Pass>(), sizeof(scalar_t), aligned, device);
}

// Sums of chunks, unless there is one: [chunks, N, kSums, C].
template <class Pass, class scalar_t>
void launch_sweep(const SweepPlan& plan, const SweepMaps<scalar_t, Pass>& maps, const SweepTables<acc_t<scalar_t>>& tables,
                  const SweepSums<acc_t<scalar_t>>& sums, const Pass& pass, Stream stream) {
  if (plan.channels_last)
    launch_kernel(sweep_images_kernel<scalar_t, Pass>, plan.launch, stream, maps, tables, sums, pass, plan);
  else
    launch_kernel(sweep_planes_kernel<scalar_t, Pass>, plan.launch, stream, maps, tables, sums, pass, plan);
}

// `allocate(count)` is memory for so many numbers of acc; sums [N, kSums, C] are what the pass leaves, times `scale`.
template <class Pass, class scalar_t, class Allocate>
void sweep_sums(const MapProblem& p, const SweepMaps<scalar_t, Pass>& maps, const SweepTables<acc_t<scalar_t>>& tables,
                double scale, acc_t<scalar_t>* sums, const Pass& pass, const DeviceNumbers& device, Stream stream,
                const Allocate& allocate) {
  using acc = acc_t<scalar_t>;
  const SweepPlan plan = plan_of(p, maps, device);
  const int64_t count = plan.rows * Pass::kSums;
  if (plan.chunks == 1) return launch_sweep(plan, maps, tables, {sums, acc(scale), 0}, pass, stream);
  acc* const partial = allocate(plan.chunks * count);
  launch_sweep(plan, maps, tables, {partial, acc(1), count}, pass, stream);
  launch_kernel(sweep_merge_kernel<acc>, choose_elements(count, kSweepMergeThreads), stream, partial, plan.chunks, count, scale,
                sums);
}

}  // namespace cotnet
