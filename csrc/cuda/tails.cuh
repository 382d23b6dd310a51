// What becomes of a sum of an aggregation before it is stored: nothing, or what follows the aggregation in a layer. A kernel
// asks for that of a channel of the output once for all sums that it has of it.
#pragma once

#include <type_traits>

#include "cuda/activations.cuh"

namespace cotnet {

struct NoTail {
  static constexpr bool kPools = false;
  COTNET_DEVICE NoTail of(int64_t) const { return {}; }
  template <class acc>
  COTNET_DEVICE acc operator()(acc sum) const {
    return sum;
  }
  // On the host, where a kernel is chosen: see Pooling.
  bool adds_map() const { return false; }
  bool aligned() const { return true; }
  NoTail start(int64_t) const { return {}; }
};

// silu(sum + shift)
template <class acc>
struct ShiftedSilu {
  static constexpr bool kPools = false;
  const acc* shift;  // [G*C]

  struct OfChannel {
    acc shift;
    COTNET_DEVICE acc operator()(acc sum) const { return silu(sum + shift); }
  };
  COTNET_DEVICE OfChannel of(int64_t channel) const { return {load_wide(shift + channel)}; }
};

// The same, and sums of it and of another map over the parts of a map that blocks have.
template <class scalar_t>
struct PooledSilu : ShiftedSilu<acc_t<scalar_t>> {
  using acc = acc_t<scalar_t>;
  static constexpr bool kPools = true;
  const scalar_t* map;  // [N, C, H, W] or null
  acc* sums;            // [parts, N*C]
  int64_t count;        // N*C
  double scale;         // of sums

  COTNET_DEVICE void write(int64_t part, int64_t channel, double sum) const {
    store_narrow(sums + part * count + channel, acc(sum * scale));
  }
};

// What the host knows of it before a kernel is chosen. start(parts): for so many parts of each map; their sums are means
// where a block has whole maps, or memory of their own that the caller merges.
template <class scalar_t, class Allocate>
struct Pooling {
  using acc = acc_t<scalar_t>;
  const acc* shift;
  const scalar_t* map;
  acc* means;  // [N*C]
  int64_t count, plane;
  const Allocate& allocate;
  mutable int64_t parts = 0;
  mutable acc* sums = nullptr;

  double scale() const { return 1 / double(plane); }
  bool adds_map() const { return map; }
  bool aligned() const { return !map || alignment_of(map) == 16; }
  PooledSilu<scalar_t> start(int64_t parts_of_map) const {
    parts = parts_of_map;
    sums = parts > 1 ? allocate(parts * count) : means;
    return {{shift}, map, sums, count, parts > 1 ? 1.0 : scale()};
  }
};

}  // namespace cotnet
