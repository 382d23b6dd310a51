// Maps as arrays of 16-byte vectors, one vector a thread and step: what spatial_softmax_gate, context_fusion and
// the sweeps of map_sweep.cuh share.
//
// NCHW: a range of elements is cut at multiples of the vector, so that every vector is aligned when the map is; the first
// and the last may belong to the range in part. channels_last: a vector holds neighbouring channels of one pixel; it is
// aligned when the channels fill whole vectors. Vectors that are in part or not aligned go element by element.
#pragma once

#include <initializer_list>

#include "cuda/device.cuh"

namespace cotnet {

template <class scalar_t>
constexpr int kMapVector = 16 / int(sizeof(scalar_t));
template <class scalar_t>
using MapPack = Pack<scalar_t, kMapVector<scalar_t>>;

// Where a vector begins, and which of its elements are meant. Few registers: a thread has several of these at hand.
template <class Offset>
struct MapSlot {
  Offset at;
  unsigned mask;  // bit i for element i, and kWhole where one access of 16 bytes moves all of them
  static constexpr unsigned kWhole = 1u << 31;

  // Elements [low, high).
  static COTNET_DEVICE MapSlot of(Offset at, int low, int high, int count, bool aligned) {
    const unsigned elements = (1u << high) - (1u << low);
    return {at, elements | (aligned && high - low == count ? kWhole : 0u)};
  }
  COTNET_DEVICE bool whole() const { return mask & kWhole; }
  COTNET_DEVICE bool has(int i) const { return mask >> i & 1; }
};

COTNET_DEVICE int between(int a, int least, int most) { return a < least ? least : a > most ? most : a; }
template <class T>
COTNET_DEVICE T maximum(T a, T b) {  // a where b is NaN
  return b > a ? b : a;
}

template <class scalar_t>
COTNET_DEVICE scalar_t minus_infinity() {
  return -scalar_t(INFINITY);
}
template <>
COTNET_DEVICE Half minus_infinity<Half>() {
  return {0xfc00};
}
template <>
COTNET_DEVICE BFloat16 minus_infinity<BFloat16>() {
  return {0xff80};
}

// ---- loads and stores

// Loads come in two parts: first `load_slot` for a batch of vectors, so that all of them are under way together, then
// `mend_slot`, which does nothing for whole vectors. Elements outside of the slot become `outside`.
template <class scalar_t, class Offset>
COTNET_DEVICE MapPack<scalar_t> load_slot(const scalar_t* map, const MapSlot<Offset>& slot) {
  return load_vec_if<kMapVector<scalar_t>>(map + slot.at, slot.whole());
}
template <class scalar_t, class Offset>
COTNET_DEVICE void mend_slot(MapPack<scalar_t>& pack, const scalar_t* map, const MapSlot<Offset>& slot, scalar_t outside) {
  if (slot.whole()) return;
  COTNET_UNROLL
  for (int i = 0; i < kMapVector<scalar_t>; ++i) {
    pack.at[i] = outside;
    if (slot.has(i)) pack.at[i] = load_vec<1>(map + slot.at + i).at[0];
  }
}
template <class scalar_t, class Offset>
COTNET_DEVICE void store_slot(scalar_t* map, const MapSlot<Offset>& slot, const MapPack<scalar_t>& pack) {
  if (slot.whole()) {
    store_vec(map + slot.at, pack);
    return;
  }
  COTNET_UNROLL
  for (int i = 0; i < kMapVector<scalar_t>; ++i)
    if (slot.has(i)) store_vec(map + slot.at + i, Pack<scalar_t, 1>{{pack.at[i]}});
}

// ---- who has which vector

// NCHW: vectors k, k + threads, ... of elements [begin, end), fewer than 2^30 of them.
template <class scalar_t>
struct PlaneVectors {
  using Slot = MapSlot<int>;
  static constexpr int kSums = 1;  // a thread's elements belong to one row
  int64_t origin;   // what slots are counted from, the same for all threads
  int first, last;  // the range, counted from there
  bool aligned;

  COTNET_DEVICE PlaneVectors(int64_t begin, int64_t end, bool aligned)
      : origin(begin / kMapVector<scalar_t> * kMapVector<scalar_t>),
        first(int(begin - origin)),
        last(int(end - origin)),
        aligned(aligned) {}

  COTNET_DEVICE Slot slot(int step) const {
    constexpr int kVector = kMapVector<scalar_t>;
    const int element = (step * int(blockDim.x) + int(threadIdx.x)) * kVector;
    const int low = between(first - element, 0, kVector), high = between(last - element, 0, kVector);
    return Slot::of(element, low, high > low ? high : low, kVector, aligned);
  }
  // The same for all threads.
  COTNET_DEVICE int steps() const {
    const int step = int(blockDim.x) * kMapVector<scalar_t>;
    return (last + step - 1) / step;
  }
  COTNET_DEVICE int lanes() const { return 1; }
};

// channels_last: thread = row * lanes + lane; a lane has one vector of channels, a row the pixels row, row + rows, ...
template <class scalar_t>
struct ImageVectors {
  using Slot = MapSlot<int64_t>;
  static constexpr int kSums = kMapVector<scalar_t>;  // each element of a vector belongs to another channel
  static constexpr int64_t origin = 0;
  int64_t first, stride;  // of the thread's pixels
  int own_steps, most_steps;
  int lane_count;  // a power of two, at most 32
  unsigned mask;   // of the lane's channels, as in a slot

  // Pixels [pixel, pixel + pixels) of an image that begins at `image`, `lanes` vectors of channels, the slab-th so many.
  COTNET_DEVICE ImageVectors(int64_t image, int64_t pixel, int pixels, int64_t channels, int64_t slab, int lanes,
                             bool aligned)
      : lane_count(lanes) {
    const int rows = int(blockDim.x) / lanes, row = int(threadIdx.x) / lanes;
    const int64_t channel = (slab * lanes + lane()) * kSums, left = channels - channel;
    first = image + (pixel + row) * channels + channel;
    stride = rows * channels;
    own_steps = (pixels - row + rows - 1) / rows;
    most_steps = (pixels + rows - 1) / rows;
    mask = Slot::of(0, 0, left < 0 ? 0 : left < kSums ? int(left) : kSums, kSums, aligned).mask;
  }

  COTNET_DEVICE Slot slot(int step) const { return {first + step * stride, step < own_steps ? mask : 0u}; }
  COTNET_DEVICE int steps() const { return most_steps; }
  COTNET_DEVICE int lanes() const { return lane_count; }
  COTNET_DEVICE int lane() const { return int(threadIdx.x) & (lane_count - 1); }
};

// Whether every map that is there begins at a multiple of 16 bytes.
inline bool are_aligned(std::initializer_list<const void*> maps) {
  for (const void* const map : maps)
    if (map && alignment_of(map) < 16) return false;
  return true;
}

// See set_grid in map_launch.h; the last few units may not exist.
COTNET_DEVICE int64_t unit_number() { return int64_t(blockIdx.z) * gridDim.y + blockIdx.y; }

}  // namespace cotnet
