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
};

template <class acc>
void merge(SoftmaxSums<acc>* total, const SoftmaxSums<acc>* next, int64_t vectors) {
  for (int64_t k = 0; k < vectors; ++k) {
    SoftmaxSums<acc> other = next[k];
    const Vec<acc> top = maximum(total[k].top, other.top);
    total[k].raise(top);
    other.raise(top);
    total[k].sum += other.sum;
    total[k].dot += other.dot;
  }
}

// For the second sweep: 1/sum in place of sum, and the sum of p*grad_y*v in place of dot.
template <class acc>
void normalise(SoftmaxSums<acc>* total, int64_t vectors) {
  for (int64_t k = 0; k < vectors; ++k) {
    total[k].sum = acc(1) / total[k].sum;
    total[k].dot *= total[k].sum;
  }
}

// ---- the two passes: what they gather beside the softmax, and what they write -----------------------------------------------

template <class scalar_t>
struct GateForward {
  using scalar = scalar_t;
  using acc = acc_t<scalar_t>;
  static constexpr bool kDot = false;
  const scalar_t* x;
  const scalar_t* v;
  const scalar_t* s;  // or null for zeros
  scalar_t* y;

  template <class Vector>
  COTNET_INLINE void finish(const Vector& vector, int64_t at, Vec<acc> p, Vec<acc>) const {
    prefetch_ahead(v + at);
    prefetch_ahead(y + at);
    Vec<acc> result = p * vector.read(v + at);
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
  using acc = acc_t<scalar_t>;
  static constexpr bool kDot = true;
  const scalar_t* x;
  const scalar_t* v;
  const scalar_t* grad_y;
  scalar_t* grad_x;
  scalar_t* grad_v;  // or null

  template <class Vector>
  COTNET_INLINE Vec<acc> product(const Vector& vector, int64_t at) const {
    prefetch_ahead(grad_y + at);
    prefetch_ahead(v + at);
    return vector.read(grad_y + at) * vector.read(v + at);
  }
  template <class Vector>
  COTNET_INLINE void finish(const Vector& vector, int64_t at, Vec<acc> p, Vec<acc> dot) const {
    prefetch_ahead(grad_x + at);
    vector.write(grad_x + at, p * (product(vector, at) - dot));
    if (grad_v) {
      prefetch_ahead(grad_v + at);
      vector.write(grad_v + at, p * vector.read(grad_y + at));
    }
  }
};

// ---- NCHW, one chunk of a plane: its maximum is found before its exponentials -----------------------------------------------

template <class scalar_t>
struct PlaneTop {
  using acc = acc_t<scalar_t>;
  const scalar_t* x;
  Vec<acc> lowest, top;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, int64_t) {
    top = maximum(top, vector.fresh_or(vector.read(x + at), lowest));
  }
};

// With kStored the exponentials go to `stored`.
template <bool kStored, class Pass>
struct PlaneExponentials {
  using acc = typename Pass::acc;
  const Pass pass;
  acc* const stored;
  SoftmaxSums<acc> sums;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, int64_t slot) {
    const Vec<acc> e = exponential(vector.read(pass.x + at) - sums.top);
    if constexpr (kStored) store(stored + slot, e);
    sums.sum += vector.fresh(e);
    if constexpr (Pass::kDot) sums.dot += vector.fresh(e * pass.product(vector, at));
  }
};

template <bool kStored, class Pass>
struct PlaneResults {
  using acc = typename Pass::acc;
  const Pass pass;
  const acc* const stored;
  const SoftmaxSums<acc> sums;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, int64_t slot) {
    Vec<acc> e;
    if constexpr (kStored)
      e = load(stored + slot);
    else
      e = exponential(vector.read(pass.x + at) - sums.top);
    pass.finish(vector, at, e * sums.sum, sums.dot);
  }
};

template <bool kStored, class Pass, class acc>
void gather_plane(const Pass& pass, int64_t begin, int64_t end, acc* stored, SoftmaxSums<acc>* out) {
  const SoftmaxSums<acc> none = SoftmaxSums<acc>::none();
  PlaneTop<typename Pass::scalar> top{pass.x, none.top, none.top};
  for_plane<acc>(begin, end, top);
  PlaneExponentials<kStored, Pass> body{pass, stored, none};
  body.sums.top = max_everywhere<acc>(top.top);
  for_plane<acc>(begin, end, body);
  out->top = body.sums.top;
  out->sum = sum_everywhere<acc>(body.sums.sum);
  out->dot = Pass::kDot ? sum_everywhere<acc>(body.sums.dot) : none.dot;
}

template <bool kStored, class Pass, class acc>
void finish_plane(const Pass& pass, int64_t begin, int64_t end, const acc* stored, const SoftmaxSums<acc>* unit) {
  PlaneResults<kStored, Pass> body{pass, stored, *unit};
  for_plane<acc>(begin, end, body);
}

// ---- channels_last, one chunk of an image: online, tile by tile --------------------------------------------------------------

template <class scalar_t>
struct ImageTop {
  const scalar_t* const x;
  Vec<acc_t<scalar_t>>* const top;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t k, int64_t at) {
    top[k] = maximum(top[k], vector.read(x + at));
  }
};

template <class Pass>
struct ImageExponentials {
  using acc = typename Pass::acc;
  const Pass pass;
  const Vec<acc>* const top;
  SoftmaxSums<acc>* const sums;
  const int64_t ahead;  // bytes to the next tile

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t k, int64_t at) {
    prefetch_ahead(pass.x + at, ahead);
    const Vec<acc> e = exponential(vector.read(pass.x + at) - top[k]);
    sums[k].sum += e;
    if constexpr (Pass::kDot) sums[k].dot += e * pass.product(vector, at);
  }
};

template <class Pass>
struct ImageResults {
  using acc = typename Pass::acc;
  const Pass pass;
  const SoftmaxSums<acc>* const sums;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t k, int64_t at) {
    prefetch_ahead(pass.x + at);
    const Vec<acc> e = exponential(vector.read(pass.x + at) - sums[k].top);
    pass.finish(vector, at, e * sums[k].sum, sums[k].dot);
  }
};

// `top` has room for one entry for each vector of channels.
template <class Pass, class acc>
void gather_image(const Pass& pass, int64_t channels, int64_t begin, int64_t end, SoftmaxSums<acc>* sums, Vec<acc>* top) {
  const int64_t vectors = channel_vectors<acc>(channels);
  const int64_t tile = std::clamp<int64_t>(kTileElements / channels, 1, kTilePixels) * channels;
  for (int64_t k = 0; k < vectors; ++k) {
    sums[k] = SoftmaxSums<acc>::none();
    top[k] = sums[k].top;
  }
  ImageTop<typename Pass::scalar> find_top{pass.x, top};
  ImageExponentials<Pass> add{pass, top, sums, tile * int64_t(sizeof(typename Pass::scalar))};
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = std::min(first + tile, end);
    for_pixels<acc>(channels, first, last, find_top);
    for (int64_t k = 0; k < vectors; ++k) sums[k].raise(top[k]);
    for_pixels<acc>(channels, first, last, add);
  }
}

template <class Pass, class acc>
void finish_image(const Pass& pass, int64_t channels, int64_t begin, int64_t end, const SoftmaxSums<acc>* sums) {
  ImageResults<Pass> body{pass, sums};
  for_pixels<acc>(channels, begin, end, body);
}

// ---- whole maps ---------------------------------------------------------------------------------------------------------------

// One chunk of a unit in either layout; `sums` and `top` have an entry for each vector of channels.
template <class Pass, class acc>
void gather_chunk(const MapCut& cut, const Pass& pass, int64_t unit, int64_t c, SoftmaxSums<acc>* sums, Vec<acc>* top) {
  if (cut.channels_last)
    gather_image(pass, cut.pitch, cut.begin(unit, c), cut.end(unit, c), sums, top);
  else
    gather_plane<false>(pass, cut.begin(unit, c), cut.end(unit, c), static_cast<acc*>(nullptr), sums);
}
template <class Pass, class acc>
void finish_chunk(const MapCut& cut, const Pass& pass, int64_t unit, int64_t c, const SoftmaxSums<acc>* sums) {
  if (cut.channels_last)
    finish_image(pass, cut.pitch, cut.begin(unit, c), cut.end(unit, c), sums);
  else
    finish_plane<false>(pass, cut.begin(unit, c), cut.end(unit, c), static_cast<const acc*>(nullptr), sums);
}

// Planes of one chunk.
template <class Pass, class Parallel>
void sweep_short_planes(const MapCut& cut, const Pass& pass, const Parallel& parallel) {
  using acc = typename Pass::acc;
  parallel(cut.units, kGateWork * cut.plane, [&](int64_t begin, int64_t end) {
    const Scratch stored(size_t(cut.plane + kLanes<acc>) * sizeof(acc)), sums(sizeof(SoftmaxSums<acc>));
    SoftmaxSums<acc>* const total = sums.as<SoftmaxSums<acc>>();
    for (int64_t unit = begin; unit < end; ++unit) {
      gather_plane<true>(pass, cut.begin(unit, 0), cut.end(unit, 0), stored.as<acc>(), total);
      normalise(total, 1);
      finish_plane<true>(pass, cut.begin(unit, 0), cut.end(unit, 0), stored.as<acc>(), total);
    }
  });
}

// Each thread takes whole units, so that the second sweep finds part of what the first one read in its cache.
template <class Pass, class Parallel>
void sweep_units(const MapCut& cut, const Pass& pass, const Parallel& parallel) {
  using acc = typename Pass::acc;
  using Sums = SoftmaxSums<acc>;
  parallel(cut.units, kGateWork * cut.plane * cut.pitch, [&](int64_t begin, int64_t end) {
    const Scratch sums(size_t(2 * cut.vectors) * sizeof(Sums)), top(size_t(cut.vectors) * sizeof(Vec<acc>));
    Sums *const total = sums.as<Sums>(), *const next = total + cut.vectors;
    for (int64_t unit = begin; unit < end; ++unit) {
      gather_chunk(cut, pass, unit, 0, total, top.as<Vec<acc>>());
      for (int64_t c = 1; c < cut.chunks; ++c) {
        gather_chunk(cut, pass, unit, c, next, top.as<Vec<acc>>());
        merge(total, next, cut.vectors);
      }
      normalise(total, cut.vectors);
      for (int64_t c = cut.chunks - 1; c >= 0; --c) finish_chunk(cut, pass, unit, c, total);  // read last, still in cache
    }
  });
}

// For fewer units than keep the threads busy: their chunks are shared out, with a pause between the sweeps.
template <class Pass, class Parallel>
void sweep_chunks(const MapCut& cut, const Pass& pass, const Parallel& parallel) {
  using acc = typename Pass::acc;
  using Sums = SoftmaxSums<acc>;
  const int64_t chunks = cut.chunks, tasks = cut.units * chunks, work = kGateWork * cut.pixels * cut.pitch;
  const Scratch memory(size_t(tasks * cut.vectors) * sizeof(Sums));
  Sums* const sums = memory.as<Sums>();
  parallel(tasks, work, [&](int64_t begin, int64_t end) {
    const Scratch top(size_t(cut.vectors) * sizeof(Vec<acc>));
    for (int64_t t = begin; t < end; ++t)
      gather_chunk(cut, pass, t / chunks, t % chunks, sums + t * cut.vectors, top.as<Vec<acc>>());
  });
  for (int64_t unit = 0; unit < cut.units; ++unit) {
    Sums* const total = sums + unit * chunks * cut.vectors;
    for (int64_t c = 1; c < chunks; ++c) merge(total, total + c * cut.vectors, cut.vectors);
    normalise(total, cut.vectors);
  }
  parallel(tasks, work, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      finish_chunk(cut, pass, t / chunks, t % chunks, sums + t / chunks * chunks * cut.vectors);
  });
}

template <class Pass, class Parallel>
void sweep_map(const MapProblem& p, const Pass& pass, const Parallel& parallel) {
  const MapCut cut = cut_map<typename Pass::acc>(p);
  if (p.batch * p.channels * p.plane == 0) return;
  if (!p.channels_last && cut.chunks == 1)
    sweep_short_planes(cut, pass, parallel);
  else if (cut.chunks == 1 || cut.units >= 2 * parallel.threads())
    sweep_units(cut, pass, parallel);
  else
    sweep_chunks(cut, pass, parallel);
}

template <class scalar_t, class Parallel>
void spatial_softmax_gate_forward(const MapProblem& p, const scalar_t* x, const scalar_t* v, const scalar_t* s, scalar_t* y,
                                  const Parallel& parallel) {
  sweep_map(p, GateForward<scalar_t>{x, v, s, y}, parallel);
}

// Either gradient may be null.
template <class scalar_t, class Parallel>
void spatial_softmax_gate_backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* v,
                                   scalar_t* grad_x, scalar_t* grad_v, const Parallel& parallel) {
  if (grad_x)
    sweep_map(p, GateBackward<scalar_t>{x, v, grad_y, grad_x, grad_v}, parallel);
  else if (grad_v)  // p*grad_y is a forward pass with grad_y in place of v, and no s
    sweep_map(p, GateForward<scalar_t>{x, grad_y, nullptr, grad_v}, parallel);
}
