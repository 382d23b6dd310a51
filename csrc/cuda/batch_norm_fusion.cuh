// The end of a contextual layer. y0 is what the aggregation left and k0 what the key convolution left; each has a norm, and
//     s = silu((y0 - m)*a + b)        r = max((k0 - m')*a' + b', 0)        y = p0*s + p1*r
// where p0 and p1 are the attention of a channel of an image. s and r are never in memory.
//
// Bytes, in maps: pool reads y0, k0, 2; fusion writes y too, 3; sums reads grad_y, y0, k0, 3; backward reads grad_y, y0 and
// writes both gradients, 4. All maps are read and written once.
#pragma once

#include "cuda/activations.cuh"
#include "cuda/norm_table.cuh"

namespace cotnet {

template <class acc>
COTNET_DEVICE acc normed(acc x, const acc* norm) {
  return fma(x - norm[0], norm[1], norm[2]);
}
template <class acc>
COTNET_DEVICE acc relu(acc z) {  // NaN stays NaN
  return z < 0 ? acc(0) : z;
}
// Sum of s + r.
struct FusionPool : SweepPass {
  static constexpr int kInputs = 2, kNormRows = 3, kOtherRows = 3, kSums = 1;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norms, acc*, acc* sum) const {
    *sum += silu(normed(in[0], norms)) + relu(normed(in[1], norms + 3));
  }
};

struct FusionBlend : SweepPass {
  static constexpr int kInputs = 2, kOutputs = 1, kNormRows = 3, kOtherRows = 3, kImageRows = 2;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norms, acc* y, acc*) const {
    *y = fma(norms[6], silu(normed(in[0], norms)), norms[7] * relu(normed(in[1], norms + 3)));
  }
};

// All that the selection and the norm need to know of a map, with s' the derivative of silu:
// the sums of g*s, g*r, g*s', s', g*s'*(y0 - m), s'*(y0 - m).
struct FusionSums : SweepPass {
  static constexpr int kInputs = 3, kNormRows = 3, kOtherRows = 3, kSums = 6;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norms, acc*, acc* sums) const {
    const acc g = in[0], centred = in[1] - norms[0], z = fma(centred, norms[1], norms[2]);
    const acc chance = sigmoid(z), s = z * chance, slope = fma(s, acc(1) - chance, chance), grad_z = g * slope;
    sums[0] = fma(g, s, sums[0]);
    sums[1] = fma(g, relu(normed(in[2], norms + 3)), sums[1]);
    sums[2] += grad_z;
    sums[3] += slope;
    sums[4] = fma(grad_z, centred, sums[4]);
    sums[5] = fma(slope, centred, sums[5]);
  }
};

// grad_y0 = a*(s'*(p0*g + q) - c - (y0 - m)*d) and the gradient of r, p1*g + q, where q comes back through the pooling.
struct FusionBackward : SweepPass {
  static constexpr int kInputs = 2, kOutputs = 2, kNormRows = 5, kImageRows = 2, kPooledRows = 1;  // m, a, b, c, d; p0, p1; q

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norm, acc* grads, acc*) const {
    const acc g = in[0], centred = in[1] - norm[0], z = fma(centred, norm[1], norm[2]), chance = sigmoid(z);
    const acc grad_z = fma(z * chance, acc(1) - chance, chance) * fma(norm[5], g, norm[7]);
    grads[0] = norm[1] * (fma(-centred, norm[4], grad_z) - norm[3]);
    grads[1] = fma(norm[6], g, norm[7]);
  }
};

// The sums of grad_z = s'*(p0*g + q), image by image.
template <class acc>
struct FusionTerms {
  const acc* attention;  // [N, 2, C]
  const acc* pooled;     // [N, C]
  const acc* sums;       // [N, 6, C]

  COTNET_DEVICE GradSums operator()(int64_t n, int64_t c, int64_t channels) const {
    const double p0 = double(load_wide(attention + 2 * n * channels + c)), q = double(load_wide(pooled + n * channels + c));
    const acc* const own = sums + 6 * n * channels + c;
    return {p0 * double(load_wide(own + 2 * channels)) + q * double(load_wide(own + 3 * channels)),
            p0 * double(load_wide(own + 4 * channels)) + q * double(load_wide(own + 5 * channels))};
  }
};

// ---- launches. `allocate(count)` is memory for so many numbers of acc.

// means [N, C].
template <class scalar_t, class Allocate>
void fusion_pool_launch(const MapProblem& p, const scalar_t* y0, const scalar_t* k0, const acc_t<scalar_t>* norm,
                        const acc_t<scalar_t>* static_norm, acc_t<scalar_t>* means, const DeviceNumbers& device, Stream stream,
                        const Allocate& allocate) {
  sweep_sums<FusionPool, scalar_t>(p, {{y0, k0}, {}}, {norm, static_norm, nullptr, nullptr}, 1 / double(p.plane), means, {},
                                   device, stream, allocate);
}

template <class scalar_t>
void fusion_blend_launch(const MapProblem& p, const scalar_t* y0, const scalar_t* k0, const acc_t<scalar_t>* norm,
                         const acc_t<scalar_t>* static_norm, const acc_t<scalar_t>* attention, scalar_t* y,
                         const DeviceNumbers& device, Stream stream) {
  const SweepMaps<scalar_t, FusionBlend> maps{{y0, k0}, {y}};
  launch_sweep<FusionBlend, scalar_t>(plan_of(p, maps, device), maps, {norm, static_norm, attention, nullptr}, {}, {}, stream);
}

// sums [N, 6, C].
template <class scalar_t, class Allocate>
void fusion_sums_launch(const MapProblem& p, const scalar_t* grad_y, const scalar_t* y0, const scalar_t* k0,
                        const acc_t<scalar_t>* norm, const acc_t<scalar_t>* static_norm, acc_t<scalar_t>* sums,
                        const DeviceNumbers& device, Stream stream, const Allocate& allocate) {
  sweep_sums<FusionSums, scalar_t>(p, {{grad_y, y0, k0}, {}}, {norm, static_norm, nullptr, nullptr}, 1, sums, {}, device, stream,
                                   allocate);
}

template <class scalar_t>
void fusion_backward_launch(const MapProblem& p, const scalar_t* grad_y, const scalar_t* y0, const NormOf<acc_t<scalar_t>>& norm,
                            const FusionTerms<acc_t<scalar_t>>& terms, scalar_t* grad_y0, scalar_t* grad_r,
                            const NormGradients<acc_t<scalar_t>>& to, const DeviceNumbers& device, Stream stream) {
  launch_norm_table(p, p.batch, terms, norm, to, stream);
  const SweepMaps<scalar_t, FusionBackward> maps{{grad_y, y0}, {grad_y0, grad_r}};
  launch_sweep<FusionBackward, scalar_t>(plan_of(p, maps, device), maps, {to.table, nullptr, terms.attention, terms.pooled}, {},
                                         {}, stream);
}

}  // namespace cotnet
