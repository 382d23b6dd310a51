// Loops of context_fusion and its gradients: with (p0, p1) = softmax of the two logits of a channel,
//     y = p0*d + p1*s        grad_d = p0*grad_y        grad_s = p1*grad_y
//     grad_logits = (t, -t) with t = p0*p1 * sum over the map of grad_y*(d - s)
// Included once per target namespace by foreach_target.h. Every pass reads and writes each map once.
#include "cpu/map_chunks.h"

constexpr int64_t kFusionWork = 3;  // multiply-adds for an element

// The weights of one vector of channels.
template <class acc>
struct FusionWeights {
  Vec<acc> dynamic;  // p0
  Vec<acc> fixed;    // p1
};
template <class acc>
COTNET_INLINE FusionWeights<acc> fusion_softmax(Vec<acc> a, Vec<acc> b) {
  const Vec<acc> top = maximum(a, b);
  a = exponential(a - top);
  b = exponential(b - top);
  const Vec<acc> scale = acc(1) / (a + b);
  return {a * scale, b * scale};
}

// The weights of a unit, one entry for each of its vectors of channels; logits [pitch, 2].
template <class scalar_t, class acc>
void unit_weights(const MapCut& cut, const scalar_t* logits, FusionWeights<acc>* weights) {
  if (!cut.channels_last) {
    weights[0] = fusion_softmax<acc>(splat<acc>(widen(logits[0])), splat<acc>(widen(logits[1])));
    return;
  }
  for (int64_t k = 0; k < cut.vectors; ++k) {
    const scalar_t* const own = logits + 2 * first_channel<acc>(cut.pitch, k);
    acc first[kLanes<acc>] = {}, second[kLanes<acc>] = {};
    for (int64_t i = 0; i < std::min<int64_t>(kLanes<acc>, cut.pitch); ++i) {
      first[i] = widen(own[2 * i]);
      second[i] = widen(own[2 * i + 1]);
    }
    weights[k] = fusion_softmax<acc>(load(first), load(second));
  }
}

// grad_logits [pitch, 2] of one unit from the sums over its map.
template <class scalar_t, class acc>
void write_grad_logits(const MapCut& cut, const FusionWeights<acc>* weights, const Vec<acc>* sums, scalar_t* grad_logits) {
  for (int64_t k = 0; k < cut.vectors; ++k) {
    const Vec<acc> t = weights[k].dynamic * weights[k].fixed * sums[k];
    scalar_t* const own = grad_logits + 2 * first_channel<acc>(cut.pitch, k);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes<acc>, cut.pitch); ++i) {
      own[2 * i] = narrow<scalar_t>(t[i]);
      own[2 * i + 1] = narrow<scalar_t>(-t[i]);
    }
  }
}

// ---- the two passes, vector by vector ----------------------------------------------------------------------------------------

template <class scalar_t>
struct FusionForward {
  using acc = acc_t<scalar_t>;
  const scalar_t* d;
  const scalar_t* s;
  scalar_t* y;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const FusionWeights<acc>& p, Vec<acc>&) const {
    prefetch_ahead(y + at);
    vector.write(y + at, p.dynamic * vector.read(d + at) + p.fixed * vector.read(s + at));
  }
};

template <class scalar_t>
struct FusionBackward {
  using acc = acc_t<scalar_t>;
  const scalar_t* grad_y;
  const scalar_t* d;
  const scalar_t* s;
  scalar_t* grad_d;  // or null
  scalar_t* grad_s;  // or null
  bool wants_sum;    // of grad_y*(d - s)

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const FusionWeights<acc>& p, Vec<acc>& sum) const {
    const Vec<acc> g = vector.read(grad_y + at);
    if (wants_sum) sum += vector.fresh(g * (vector.read(d + at) - vector.read(s + at)));
    if (grad_d) {
      prefetch_ahead(grad_d + at);
      vector.write(grad_d + at, p.dynamic * g);
    }
    if (grad_s) {
      prefetch_ahead(grad_s + at);
      vector.write(grad_s + at, p.fixed * g);
    }
  }
};

// ---- one chunk ---------------------------------------------------------------------------------------------------------------

template <class Pass>
struct PlaneFusion {
  using acc = typename Pass::acc;
  const Pass pass;
  const FusionWeights<acc> weights;
  Vec<acc> sum;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, int64_t) {
    pass(vector, at, weights, sum);
  }
};

template <class Pass>
struct ImageFusion {
  using acc = typename Pass::acc;
  const Pass pass;
  const FusionWeights<acc>* const weights;
  Vec<acc>* const sums;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t k, int64_t at) {
    pass(vector, at, weights[k], sums[k]);
  }
};

// Leaves the sums over the chunk in `sums`.
template <class Pass, class acc>
void sweep_chunk(const MapCut& cut, int64_t begin, int64_t end, const Pass& pass, const FusionWeights<acc>* weights, Vec<acc>* sums) {
  if (cut.channels_last) {
    for (int64_t k = 0; k < cut.vectors; ++k) sums[k] = Vec<acc>{};
    ImageFusion<Pass> body{pass, weights, sums};
    for_pixels<acc>(cut.pitch, begin, end, body);
  } else {
    PlaneFusion<Pass> body{pass, *weights, Vec<acc>{}};
    for_plane<acc>(begin, end, body);
    *sums = sum_everywhere<acc>(body.sum);
  }
}

// ---- whole maps --------------------------------------------------------------------------------------------------------------

// Runs the pass over all chunks of all units. done(unit, chunk, weights, sums) is called after each with the sums over it.
template <class Pass, class scalar_t, class Done, class Parallel>
void sweep_once(const MapCut& cut, const scalar_t* logits, const Pass& pass, const Done& done, const Parallel& parallel) {
  using acc = typename Pass::acc;
  using Weights = FusionWeights<acc>;
  parallel(cut.units * cut.chunks, kFusionWork * cut.pixels * cut.pitch, [&](int64_t first, int64_t last) {
    const Scratch weight_memory(size_t(cut.vectors) * sizeof(Weights)), sum_memory(size_t(cut.vectors) * sizeof(Vec<acc>));
    Weights* const weights = weight_memory.as<Weights>();
    Vec<acc>* const sums = sum_memory.as<Vec<acc>>();
    for (int64_t t = first; t < last; ++t) {
      const int64_t unit = t / cut.chunks, chunk = t % cut.chunks;
      if (t == first || chunk == 0) unit_weights(cut, logits + 2 * unit * cut.pitch, weights);
      sweep_chunk(cut, cut.begin(unit, chunk), cut.end(unit, chunk), pass, weights, sums);
      done(unit, chunk, weights, sums);
    }
  });
}

// grad_logits from the sums of all chunks, added in order.
template <class scalar_t>
void finish_grad_logits(const MapCut& cut, const scalar_t* logits, Vec<acc_t<scalar_t>>* sums, scalar_t* grad_logits) {
  using acc = acc_t<scalar_t>;
  const Scratch memory(size_t(cut.vectors) * sizeof(FusionWeights<acc>));
  FusionWeights<acc>* const weights = memory.as<FusionWeights<acc>>();
  for (int64_t unit = 0; unit < cut.units; ++unit) {
    Vec<acc>* const total = sums + unit * cut.chunks * cut.vectors;
    for (int64_t c = 1; c < cut.chunks; ++c)
      for (int64_t k = 0; k < cut.vectors; ++k) total[k] += total[c * cut.vectors + k];
    unit_weights(cut, logits + 2 * unit * cut.pitch, weights);
    write_grad_logits(cut, weights, total, grad_logits + 2 * unit * cut.pitch);
  }
}

template <class scalar_t, class Parallel>
void context_fusion_forward(const MapProblem& p, const scalar_t* d, const scalar_t* s, const scalar_t* logits, scalar_t* y,
                            const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const auto nothing = [](int64_t, int64_t, const FusionWeights<acc>*, const Vec<acc>*) {};
  sweep_once(cut_map<acc>(p), logits, FusionForward<scalar_t>{d, s, y}, nothing, parallel);
}

// Any gradient may be null. grad_logits [N, C, 2].
template <class scalar_t, class Parallel>
void context_fusion_backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* d, const scalar_t* s,
                             const scalar_t* logits, scalar_t* grad_d, scalar_t* grad_s, scalar_t* grad_logits,
                             const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const MapCut cut = cut_map<acc>(p);
  const FusionBackward<scalar_t> pass{grad_y, d, s, grad_d, grad_s, grad_logits != nullptr};
  // The sums of the chunks of longer maps are kept until all are there.
  const bool keeps = grad_logits && cut.chunks > 1;
  const size_t bytes = size_t(cut.vectors) * sizeof(Vec<acc>);
  const Scratch memory(keeps ? size_t(cut.units * cut.chunks) * bytes : 0);
  Vec<acc>* const kept = memory.as<Vec<acc>>();
  const auto done = [&](int64_t unit, int64_t chunk, const FusionWeights<acc>* weights, const Vec<acc>* sums) {
    if (keeps)
      std::memcpy(kept + (unit * cut.chunks + chunk) * cut.vectors, sums, bytes);
    else if (grad_logits)
      write_grad_logits(cut, weights, sums, grad_logits + 2 * unit * cut.pitch);
  };
  sweep_once(cut, logits, pass, done, parallel);
  if (keeps) finish_grad_logits(cut, logits, kept, grad_logits);
}
