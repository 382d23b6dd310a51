// Loops of spatial_softmax_gate and its gradients: with p = softmax over the map of x,
//     y = s + p*v        grad_v = p*grad_y        grad_x = p*(grad_y*v - sum of p*grad_y*v)
// Included once per target namespace by foreach_target.h.
//
// A map is swept twice. The first sweep gathers its maximum, its sum of exponentials and, for grad_x, the sum of
// p*grad_y*v; the second writes the results. A plane of one chunk keeps its exponentials in scratch memory in between;
// everything longer computes them again, which costs less than memory for them would.
#include "cpu/map_chunks.h"

// channels_last: elements whose maximum is taken before their exponentials. Few, to find them in the first-level cache.
constexpr int64_t kTileElements = 4096;
constexpr int64_t kTilePixels = 16;
constexpr int64_t kGateWork = 8;  // multiply-adds that an element costs, roughly

// What the first sweep knows of a chunk or a unit, for each vector of channels.
template <class acc>
struct SoftmaxSums {
  Vec<acc> top;  // maximum of x
  Vec<acc> sum;  // of exp(x - top)
  Vec<acc> dot;  // of exp(x - top)*grad_y*v

  // Starting at the lowest number, not at -inf, keeps x - top defined where all of x is -inf.
  static COTNET_INLINE SoftmaxSums none() { return {splat(std::numeric_limits<acc>::lowest()), Vec<acc>{}, Vec<acc>{}}; }

  COTNET_INLINE void raise(Vec<acc> new_top) {
    const Vec<acc> shrink = exponential(top - new_top);
    top = new_top;
    sum *= shrink;
    dot *= shrink;
  }
  COTNET_INLINE void merge(SoftmaxSums other) {
    const Vec<acc> new_top = maximum(top, other.top);
    raise(new_top);
    other.raise(new_top);
    sum += other.sum;
    dot += other.dot;
  }
  // For the second sweep: 1/sum in place of sum, and the sum of p*grad_y*v in place of dot.
  COTNET_INLINE void normalise() {
    sum = acc(1) / sum;
    dot *= sum;
  }
};

template <class scalar_t>
struct GateForward {
  using scalar = scalar_t;
  static constexpr bool kDot = false;
  const scalar_t* x;
  const scalar_t* v;
  const scalar_t* s;  // or null for zeros
  scalar_t* y;

  template <class Vector>
  COTNET_INLINE void finish(const Vector& vector, int64_t at, Vec<acc_t<scalar_t>> p, Vec<acc_t<scalar_t>>) const {
    prefetch_ahead(v + at);
    prefetch_ahead(y + at);
    Vec<acc_t<scalar_t>> result = p * vector.read(v + at);
    if (s) {
      prefetch_ahead(s + at);
      result += vector.read(s + at);
    }
    vector.write(y + at, result);
  }
};

template <class scalar_t>
struct GateBackward {
  using scalar = scalar_t;
  static constexpr bool kDot = true;
  const scalar_t* x;
  const scalar_t* v;
  const scalar_t* grad_y;
  scalar_t* grad_x;
  scalar_t* grad_v;  // or null

  template <class Vector>
  COTNET_INLINE Vec<acc_t<scalar_t>> product(const Vector& vector, int64_t at) const {
    prefetch_ahead(grad_y + at);
    prefetch_ahead(v + at);
    return vector.read(grad_y + at) * vector.read(v + at);
  }
  template <class Vector>
  COTNET_INLINE void finish(const Vector& vector, int64_t at, Vec<acc_t<scalar_t>> p, Vec<acc_t<scalar_t>> dot) const {
    prefetch_ahead(grad_x + at);
    const Vec<acc_t<scalar_t>> product_here = product(vector, at);
    vector.write(grad_x + at, p * (product_here - dot));
    if (grad_v) {
      prefetch_ahead(grad_v + at);
      vector.write(grad_v + at, p * vector.read(grad_y + at));
    }
  }
};

// ---- NCHW, one chunk: its maximum is found before its exponentials -------------------------------------------------------

template <bool kStored, class Pass, class acc>
void gather_plane(const Pass pass, int64_t begin, int64_t end, acc* stored, SoftmaxSums<acc>* out) {
  SoftmaxSums<acc> sums = SoftmaxSums<acc>::none();
  const Vec<acc> lowest = sums.top;
  for_plane<acc>(begin, end, [&](auto vector, int64_t at, int64_t) COTNET_INLINE_LAMBDA {
    sums.top = maximum(sums.top, vector.fresh_or(vector.read(pass.x + at), lowest));
  });
  sums.top = max_everywhere<acc>(sums.top);
  for_plane<acc>(begin, end, [&](auto vector, int64_t at, int64_t slot) COTNET_INLINE_LAMBDA {
    const Vec<acc> e = exponential(vector.read(pass.x + at) - sums.top);
    if (kStored) store(stored + slot, e);
    sums.sum += vector.fresh(e);
    if constexpr (Pass::kDot) sums.dot += vector.fresh(e * pass.product(vector, at));
  });
  sums.sum = sum_everywhere<acc>(sums.sum);
  if constexpr (Pass::kDot) sums.dot = sum_everywhere<acc>(sums.dot);
  *out = sums;
}

template <bool kStored, class Pass, class acc>
void finish_plane(const Pass pass, int64_t begin, int64_t end, const acc* stored, const SoftmaxSums<acc>* unit) {
  const SoftmaxSums<acc> sums = *unit;
  for_plane<acc>(begin, end, [&](auto vector, int64_t at, int64_t slot) COTNET_INLINE_LAMBDA {
    const Vec<acc> e = kStored ? load(stored + slot) : exponential(vector.read(pass.x + at) - sums.top);
    pass.finish(vector, at, e * sums.sum, sums.dot);
  });
}

// ---- channels_last, one chunk: online, tile by tile ----------------------------------------------------------------------

template <class Pass, class acc>
void gather_image(const Pass pass, int64_t channels, int64_t begin, int64_t end, SoftmaxSums<acc>* sums, Vec<acc>* top) {
  const int64_t vectors = channel_vectors<acc>(channels);
  const int64_t tile = std::clamp<int64_t>(kTileElements / channels, 1, kTilePixels) * channels;
  for (int64_t k = 0; k < vectors; ++k) {
    sums[k] = SoftmaxSums<acc>::none();
    top[k] = sums[k].top;
  }
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = std::min(first + tile, end);
    for_pixels<acc>(channels, first, last, [&](auto vector, int64_t k, int64_t at) COTNET_INLINE_LAMBDA {
      top[k] = maximum(top[k], vector.read(pass.x + at));
    });
    for (int64_t k = 0; k < vectors; ++k) sums[k].raise(top[k]);
    for_pixels<acc>(channels, first, last, [&](auto vector, int64_t k, int64_t at) COTNET_INLINE_LAMBDA {
      __builtin_prefetch(pass.x + at + tile);
      const Vec<acc> e = exponential(vector.read(pass.x + at) - top[k]);
      sums[k].sum += e;
      if constexpr (Pass::kDot) sums[k].dot += e * pass.product(vector, at);
    });
  }
}

template <class Pass, class acc>
void finish_image(const Pass pass, int64_t channels, int64_t begin, int64_t end, const SoftmaxSums<acc>* sums) {
  for_pixels<acc>(channels, begin, end, [&](auto vector, int64_t k, int64_t at) COTNET_INLINE_LAMBDA {
    prefetch_ahead(pass.x + at);
    const Vec<acc> e = exponential(vector.read(pass.x + at) - sums[k].top);
    pass.finish(vector, at, e * sums[k].sum, sums[k].dot);
  });
}

// ---- whole maps ------------------------------------------------------------------------------------------------------------

// Planes of one chunk.
template <class acc, class Pass, class Parallel>
void sweep_short_planes(const MapCut& cut, const Pass& pass, const Parallel& parallel) {
  parallel(cut.units, kGateWork * cut.plane, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Vec<acc>[]> slots(new Vec<acc>[size_t(ceil_div(cut.plane, kLanes<acc>))]);
    acc* const stored = reinterpret_cast<acc*>(slots.get());
    SoftmaxSums<acc> sums;
    for (int64_t unit = begin; unit < end; ++unit) {
      gather_plane<true>(pass, cut.begin(unit, 0), cut.end(unit, 0), stored, &sums);
      sums.normalise();
      finish_plane<true>(pass, cut.begin(unit, 0), cut.end(unit, 0), stored, &sums);
    }
  });
}

// gather(unit, chunk, sums, scratch) and finish(unit, chunk, sums) over all chunks of all units, where `sums` and `scratch`
// hold one entry for each vector of channels.
template <class acc, class Gather, class Finish, class Parallel>
void sweep_twice(const MapCut& cut, const Gather& gather, const Finish& finish, const Parallel& parallel, int64_t threads) {
  using Sums = SoftmaxSums<acc>;
  const int64_t vectors = cut.vectors, chunks = cut.chunks, work = kGateWork * cut.chunk_elements();
  const auto merge = [vectors](Sums* total, const Sums* next) {
    for (int64_t k = 0; k < vectors; ++k) total[k].merge(next[k]);
  };
  const auto normalise = [vectors](Sums* total) {
    for (int64_t k = 0; k < vectors; ++k) total[k].normalise();
  };
  if (chunks == 1 || cut.units >= 2 * threads) {
    parallel(cut.units, work * chunks, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Sums[]> memory(new Sums[size_t(2 * vectors)]);
      const std::unique_ptr<Vec<acc>[]> scratch(new Vec<acc>[size_t(vectors)]);
      Sums *const total = memory.get(), *const next = total + vectors;
      for (int64_t unit = begin; unit < end; ++unit) {
        gather(unit, 0, total, scratch.get());
        for (int64_t c = 1; c < chunks; ++c) {
          gather(unit, c, next, scratch.get());
          merge(total, next);
        }
        normalise(total);
        for (int64_t c = chunks - 1; c >= 0; --c) finish(unit, c, total);  // what was read last is still in cache
      }
    });
    return;
  }
  // Too few units for the threads: their chunks are shared out, with a pause between the sweeps.
  const int64_t tasks = cut.units * chunks;
  const std::unique_ptr<Sums[]> memory(new Sums[size_t(tasks * vectors)]);
  Sums* const sums = memory.get();
  parallel(tasks, work, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Vec<acc>[]> scratch(new Vec<acc>[size_t(vectors)]);
    for (int64_t t = begin; t < end; ++t) gather(t / chunks, t % chunks, sums + t * vectors, scratch.get());
  });
  for (int64_t unit = 0; unit < cut.units; ++unit) {
    Sums* const total = sums + unit * chunks * vectors;
    for (int64_t c = 1; c < chunks; ++c) merge(total, total + c * vectors);
    normalise(total);
  }
  parallel(tasks, work, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) finish(t / chunks, t % chunks, sums + t / chunks * chunks * vectors);
  });
}

template <class Pass, class Parallel>
void sweep_map(const MapProblem& p, const Pass& pass, const Parallel& parallel, int64_t threads) {
  using acc = acc_t<typename Pass::scalar>;
  using Sums = SoftmaxSums<acc>;
  const MapCut cut = cut_map<acc>(p);
  if (p.channels_last) {
    sweep_twice<acc>(
        cut,
        [&](int64_t unit, int64_t c, Sums* sums, Vec<acc>* scratch) {
          gather_image(pass, p.channels, cut.begin(unit, c), cut.end(unit, c), sums, scratch);
        },
        [&](int64_t unit, int64_t c, const Sums* sums) {
          finish_image(pass, p.channels, cut.begin(unit, c), cut.end(unit, c), sums);
        },
        parallel, threads);
  } else if (cut.chunks == 1) {
    sweep_short_planes<acc>(cut, pass, parallel);
  } else {
    sweep_twice<acc>(
        cut,
        [&](int64_t unit, int64_t c, Sums* sums, Vec<acc>*) {
          gather_plane<false>(pass, cut.begin(unit, c), cut.end(unit, c), static_cast<acc*>(nullptr), sums);
        },
        [&](int64_t unit, int64_t c, const Sums* sums) {
          finish_plane<false>(pass, cut.begin(unit, c), cut.end(unit, c), static_cast<const acc*>(nullptr), sums);
        },
        parallel, threads);
  }
}

template <class scalar_t, class Parallel>
void spatial_softmax_gate_forward(const MapProblem& p, const scalar_t* x, const scalar_t* v, const scalar_t* s, scalar_t* y,
                                  const Parallel& parallel, int64_t threads) {
  sweep_map(p, GateForward<scalar_t>{x, v, s, y}, parallel, threads);
}

// Either gradient may be null.
template <class scalar_t, class Parallel>
void spatial_softmax_gate_backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* v,
                                   scalar_t* grad_x, scalar_t* grad_v, const Parallel& parallel, int64_t threads) {
  if (grad_x)
    sweep_map(p, GateBackward<scalar_t>{x, v, grad_y, grad_x, grad_v}, parallel, threads);
  else if (grad_v)  // p*grad_y is a forward pass with grad_y in place of v, and no s
    sweep_map(p, GateForward<scalar_t>{x, grad_y, nullptr, grad_v}, parallel, threads);
}
