// BatchNorm with what follows it. A norm is three numbers a channel, m, a and b:
//     z = (x - m)*a + b        y = z or max(z, 0)
//     grad_x = a*(grad_z - c - (x - m)*d)
// where c and d are 0 for given statistics; for those of the batch, c is the mean of grad_z and d the mean of
// grad_z*(x - m), times f*f, where f = 1/sqrt(variance + eps).
//
// Bytes, in maps: statistics read x, 1; forward writes y too, 2; backward reads grad_y and x twice, once for the sums, and
// writes grad_x, 5.
#pragma once

#include "cuda/norm_table.cuh"

namespace cotnet {

struct NormForward : SweepPass {
  static constexpr int kInputs = 1, kOutputs = 1, kNormRows = 3;
  bool relu;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norm, acc* y, acc*) const {
    const acc z = fma(in[0] - norm[0], norm[1], norm[2]);
    *y = relu && z < 0 ? acc(0) : z;  // NaN stays NaN
  }
};

// grad_z at an element.
template <class acc>
COTNET_DEVICE acc grad_before_relu(bool relu, acc g, acc centred, const acc* norm) {
  return relu && fma(centred, norm[1], norm[2]) <= 0 ? acc(0) : g;
}

// Sums of grad_z, and of grad_z*(x - m).
struct NormSums : SweepPass {
  static constexpr int kInputs = 2, kNormRows = 3, kSums = 2;
  bool relu;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norm, acc*, acc* sums) const {
    const acc centred = in[1] - norm[0], grad_z = grad_before_relu(relu, in[0], centred, norm);
    sums[0] += grad_z;
    sums[1] = fma(grad_z, centred, sums[1]);
  }
};

struct NormBackward : SweepPass {
  static constexpr int kInputs = 2, kOutputs = 1, kNormRows = 5;  // m, a, b, c, d
  bool relu;

  template <class acc>
  COTNET_DEVICE void operator()(const acc* in, const acc* norm, acc* grad_x, acc*) const {
    const acc centred = in[1] - norm[0], grad_z = grad_before_relu(relu, in[0], centred, norm);
    *grad_x = norm[1] * (fma(-centred, norm[4], grad_z) - norm[3]);
  }
};

// The sums of images, or chunks of them.
template <class acc>
struct NormTerms {
  const acc* sums;  // [parts, 2, C]

  COTNET_DEVICE GradSums operator()(int64_t part, int64_t c, int64_t channels) const {
    const acc* const own = sums + 2 * part * channels + c;
    return {double(load_wide(own)), double(load_wide(own + channels))};
  }
};

// ---- launches. `allocate(count)` is memory for so many numbers of acc.

template <class scalar_t>
void norm_forward_launch(const MapProblem& whole, const scalar_t* x, const acc_t<scalar_t>* norm, bool relu, scalar_t* y,
                         const DeviceNumbers& device, Stream stream) {
  const SweepMaps<scalar_t, NormForward> maps{{x}, {y}};
  launch_sweep<NormForward, scalar_t>(plan_of(without_images(whole), maps, device), maps, {norm, nullptr, nullptr, nullptr}, {},
                                      {{}, relu}, stream);
}

template <class scalar_t, class Allocate>
void norm_backward_launch(const MapProblem& whole, const scalar_t* grad_y, const scalar_t* x, const NormOf<acc_t<scalar_t>>& norm,
                          bool relu, scalar_t* grad_x, const NormGradients<acc_t<scalar_t>>& to, const DeviceNumbers& device,
                          Stream stream, const Allocate& allocate) {
  using acc = acc_t<scalar_t>;
  const MapProblem p = without_images(whole);
  const SweepMaps<scalar_t, NormSums> inputs{{grad_y, x}, {}};
  const SweepPlan plan = plan_of(p, inputs, device);
  acc* const sums = allocate(2 * plan.rows * plan.chunks);
  launch_sweep<NormSums, scalar_t>(plan, inputs, {norm.table, nullptr, nullptr, nullptr}, {sums, acc(1), 2 * plan.rows},
                                   {{}, relu}, stream);
  launch_norm_table(p, p.batch * plan.chunks, NormTerms<acc>{sums}, norm, to, stream);
  const SweepMaps<scalar_t, NormBackward> maps{{grad_y, x}, {grad_x}};
  launch_sweep<NormBackward, scalar_t>(plan_of(p, maps, device), maps, {to.table, nullptr, nullptr, nullptr}, {}, {{}, relu},
                                       stream);
}

}  // namespace cotnet
