// Loops of the end of a contextual layer. y0 is what the aggregation left and k0 what the key convolution left; each has a
// norm, and
//     s = silu((y0 - m)*a + b)        r = max((k0 - m')*a' + b', 0)        y = p0*s + p1*r
// where p0 and p1 are the attention of a channel of an image. s and r are never in memory.
// Included once per target namespace by foreach_target.h.
#include "cpu/activations.h"
#include "cpu/norm_table.h"

// Sum of s + r.
template <class scalar_t>
struct FusionPool {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 6, kImageCoefficients = 0, kSums = 1;
  const scalar_t* y0;
  const scalar_t* k0;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norms, Vec<acc>* sum) const {
    *sum += vector.fresh(silu(normed(vector.read(y0 + at), norms)) + rectified(normed(vector.read(k0 + at), norms + 3)));
  }
};

template <class scalar_t>
struct FusionBlend {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 6, kImageCoefficients = 2, kSums = 0;
  const scalar_t* y0;
  const scalar_t* k0;
  scalar_t* y;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norms, Vec<acc>*) const {
    prefetch_ahead(y + at);
    const Vec<acc> s = silu(normed(vector.read(y0 + at), norms)), r = rectified(normed(vector.read(k0 + at), norms + 3));
    vector.write(y + at, norms[6] * s + norms[7] * r);
  }
};

// All that the selection and the norm need to know of a map, with s' the derivative of silu:
// the sums of g*s, g*r, g*s', s', g*s'*(y0 - m), s'*(y0 - m).
template <class scalar_t>
struct FusionSums {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 6, kImageCoefficients = 0, kSums = 6;
  const scalar_t* grad_y;
  const scalar_t* y0;
  const scalar_t* k0;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norms, Vec<acc>* sums) const {
    const Vec<acc> g = vector.read(grad_y + at), centred = vector.read(y0 + at) - norms[0];
    const Vec<acc> z = centred * norms[1] + norms[2], chance = sigmoid(z), s = z * chance;
    const Vec<acc> slope = vector.fresh(chance + s * (1 - chance)), grad_z = vector.fresh(g * slope);
    sums[0] += vector.fresh(g * s);
    sums[1] += vector.fresh(g * rectified(normed(vector.read(k0 + at), norms + 3)));
    sums[2] += grad_z;
    sums[3] += slope;
    sums[4] += vector.fresh(grad_z * centred);
    sums[5] += vector.fresh(slope * centred);
  }
};

// grad_y0 = a*(s'*(p0*g + q) - c - (y0 - m)*d) and the gradient of r, p1*g + q, where q comes back through the pooling.
template <class scalar_t>
struct FusionBackward {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 5, kImageCoefficients = 3, kSums = 0;  // m, a, b, c, d; p0, p1, q
  const scalar_t* grad_y;
  const scalar_t* y0;
  scalar_t* grad_y0;
  scalar_t* grad_r;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norm, Vec<acc>*) const {
    prefetch_ahead(grad_y0 + at);
    prefetch_ahead(grad_r + at);
    const Vec<acc> g = vector.read(grad_y + at), centred = vector.read(y0 + at) - norm[0];
    const Vec<acc> z = centred * norm[1] + norm[2], chance = sigmoid(z);
    const Vec<acc> grad_z = (chance + z * chance * (1 - chance)) * (norm[5] * g + norm[7]);
    vector.write(grad_y0 + at, norm[1] * (grad_z - norm[3] - centred * norm[4]));
    vector.write(grad_r + at, norm[6] * g + norm[7]);
  }
};

// Both norms one below the other, [6, C].
template <class acc>
void stack_norms(const MapProblem& p, const acc* dynamic, const acc* fixed, acc* to) {
  std::copy(dynamic, dynamic + 3 * p.channels, to);
  std::copy(fixed, fixed + 3 * p.channels, to + 3 * p.channels);
}

// means [N, C].
template <class scalar_t, class Parallel>
void fusion_pool(const MapProblem& p, const scalar_t* y0, const scalar_t* k0, const acc_t<scalar_t>* y0_norm,
                 const acc_t<scalar_t>* k0_norm, acc_t<scalar_t>* means, const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const Scratch memory(size_t(6 * p.channels) * sizeof(acc));
  stack_norms(p, y0_norm, k0_norm, memory.as<acc>());
  sweep(p, SweepTables<acc>{memory.as<acc>(), nullptr}, FusionPool<scalar_t>{y0, k0}, means, parallel);
  for (int64_t i = 0; i < p.batch * p.channels; ++i) means[i] /= acc(p.plane);
}

template <class scalar_t, class Parallel>
void fusion_blend(const MapProblem& p, const scalar_t* y0, const scalar_t* k0, const acc_t<scalar_t>* y0_norm,
                  const acc_t<scalar_t>* k0_norm, const acc_t<scalar_t>* attention, scalar_t* y, const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const Scratch memory(size_t(6 * p.channels) * sizeof(acc));
  stack_norms(p, y0_norm, k0_norm, memory.as<acc>());
  acc* const none = nullptr;
  sweep(p, SweepTables<acc>{memory.as<acc>(), attention}, FusionBlend<scalar_t>{y0, k0, y}, none, parallel);
}

// sums [N, 6, C].
template <class scalar_t, class Parallel>
void fusion_sums(const MapProblem& p, const scalar_t* grad_y, const scalar_t* y0, const scalar_t* k0,
                 const acc_t<scalar_t>* y0_norm, const acc_t<scalar_t>* k0_norm, acc_t<scalar_t>* sums, const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const Scratch memory(size_t(6 * p.channels) * sizeof(acc));
  stack_norms(p, y0_norm, k0_norm, memory.as<acc>());
  sweep(p, SweepTables<acc>{memory.as<acc>(), nullptr}, FusionSums<scalar_t>{grad_y, y0, k0}, sums, parallel);
}

// attention [N, 2, C] and pooled [N, C], the gradient that the pooling hands to every pixel, below each other for each image.
template <class acc>
void stack_attention(const MapProblem& p, const acc* attention, const acc* pooled, acc* to) {
  for (int64_t n = 0; n < p.batch; ++n) {
    std::copy(attention + 2 * n * p.channels, attention + (2 * n + 2) * p.channels, to + 3 * n * p.channels);
    std::copy(pooled + n * p.channels, pooled + (n + 1) * p.channels, to + (3 * n + 2) * p.channels);
  }
}

template <class scalar_t, class Parallel>
void fusion_backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* y0, const NormOf<acc_t<scalar_t>>& norm,
                     const acc_t<scalar_t>* attention, const acc_t<scalar_t>* pooled, const acc_t<scalar_t>* sums,
                     scalar_t* grad_y0, scalar_t* grad_r, acc_t<scalar_t>* grad_weight, acc_t<scalar_t>* grad_bias,
                     const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const Scratch table_memory(size_t(5 * p.channels) * sizeof(acc)), image_memory(size_t(3 * p.batch * p.channels) * sizeof(acc));
  acc* const table = table_memory.as<acc>();
  for (int64_t c = 0; c < p.channels; ++c) {
    double grad_z = 0, with_x = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      const double p0 = double(attention[2 * n * p.channels + c]), q = double(pooled[n * p.channels + c]);
      const acc* const own = sums + 6 * n * p.channels + c;
      grad_z += p0 * double(own[2 * p.channels]) + q * double(own[3 * p.channels]);
      with_x += p0 * double(own[4 * p.channels]) + q * double(own[5 * p.channels]);
    }
    norm_backward_row(p, norm, c, grad_z, with_x, table, grad_weight, grad_bias);
  }
  stack_attention(p, attention, pooled, image_memory.as<acc>());
  acc* const none = nullptr;
  sweep(p, SweepTables<acc>{table, image_memory.as<acc>()}, FusionBackward<scalar_t>{grad_y, y0, grad_y0, grad_r}, none, parallel);
}
