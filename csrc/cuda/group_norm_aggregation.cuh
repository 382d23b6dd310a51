// group_norm_aggregation and its backward on CUDA, on raw pointers. Normalised weights live in registers only; statistics
// and gradients of whole groups are sums of a fixed order, over parts of a group and then over the parts.
#pragma once

#include "core/operands.h"
#include "cuda/aggregation.cuh"
#include "cuda/aggregation_direct.cuh"
#include "cuda/aggregation_image_backward.cuh"
#include "cuda/aggregation_pixels.cuh"
#include "cuda/aggregation_tile_backward.cuh"
#include "cuda/block_sum.cuh"
#include "cuda/group_norm_aggregation_launch.h"
#include "cuda/group_norm_image.cuh"

namespace cotnet {

constexpr int kNormThreads = 256;

// Element e of the K * plane elements of a group, in the order of memory within it.
COTNET_DEVICE int64_t element_of_group(const AggregationProblem& p, const WeightStrides& s, int64_t e) {
  if (!p.channels_last) return e;
  const int64_t tap = split(e, p.taps());
  return tap * s.tap + e * s.position;
}

// A block owns one part of one group: its mean, then the squares of what remains. The second reading is of the cache.
template <class scalar_t>
COTNET_KERNEL(kNormThreads, 1)
group_norm_statistics_kernel(const AggregationProblem p, const WeightStrides strides, const NormParts parts,
                             const scalar_t* w /* [N, G, Cw, K, Ho, Wo] */, double* moments /* [N*G*Cw, parts, 2] */) {
  using acc = acc_t<scalar_t>;
  COTNET_SHARED(double, warps, kNormThreads / 32);
  const int64_t unit = int64_t(blockIdx.x) / parts.count, part = int64_t(blockIdx.x) - unit * parts.count;
  const int64_t groups = p.heads * p.weight_channels, image = unit / groups, size = p.taps() * p.out_plane();
  const scalar_t* const from = w + image * strides.image + (unit - image * groups) * strides.group;
  const int64_t begin = part * parts.elements, end = begin + parts.elements < size ? begin + parts.elements : size;
  LongSum<acc> sum;
  for (int64_t e = begin + threadIdx.x; e < end; e += kNormThreads) sum.add(load_wide(from + element_of_group(p, strides, e)));
  const double mean = block_sum<kNormThreads>(sum.total(), warps) / double(end - begin);
  LongSum<acc> squares;
  for (int64_t e = begin + threadIdx.x; e < end; e += kNormThreads) {
    const acc distance = load_wide(from + element_of_group(p, strides, e)) - acc(mean);
    squares.add(distance * distance);
  }
  // Distances were taken from the rounded mean: corrected for what rounding moved it by.
  const double moved = mean - double(acc(mean));
  const double total = block_sum<kNormThreads>(squares.total(), warps) - double(end - begin) * moved * moved;
  if (threadIdx.x == 0) {
    moments[2 * int64_t(blockIdx.x)] = mean;
    moments[2 * int64_t(blockIdx.x) + 1] = total > 0 || total != total ? total : 0;
  }
}

// A thread owns one group: merges its parts in order (Chan, Golub, LeVeque).
template <class acc>
COTNET_KERNEL(kNormThreads, 1)
group_norm_merge_kernel(int64_t units, int64_t size, const NormParts parts, double eps,
                        const double* moments /* [units, parts, 2] */, acc* mean /* [units] */, acc* rstd /* [units] */) {
  const int64_t unit = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (unit >= units) return;
  double count = 0, average = 0, squares = 0;
  for (int64_t part = 0; part < parts.count; ++part) {
    const Pack<double, 2> next = load_vec<2>(moments + 2 * (unit * parts.count + part));
    const int64_t rest = size - part * parts.elements;
    const double more = double(rest < parts.elements ? rest : parts.elements), distance = next.at[0] - average;
    squares += next.at[1] + distance * distance * count * more / (count + more);
    average += distance * more / (count + more);
    count += more;
  }
  store_vec(mean + unit, Pack<acc, 1>{{acc(average)}});
  store_vec(rstd + unit, Pack<acc, 1>{{acc(inverse_sqrt(squares / double(size) + eps))}});
}

template <class scalar_t>
NormWeights<scalar_t> norm_weights(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a) {
  return {{a.w, weight_strides(p)}, a.mean, a.rstd, a.gamma, a.beta};
}

// Writes mean and rstd. scratch: group_norm_forward_scratch(p, parts) doubles.
template <class scalar_t>
void launch_group_norm_statistics(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps,
                                  const NormParts& parts, double* scratch, Stream stream) {
  const int64_t units = p.batch * p.heads * p.weight_channels;
  Launch launch;
  launch.grid_x = unsigned(units * parts.count);
  launch.threads = kNormThreads;
  if (!try_group_norm_image_statistics(p, parts, a.w, scratch, stream))
    launch_kernel(group_norm_statistics_kernel<scalar_t>, launch, stream, p, weight_strides(p), parts, a.w, scratch);
  launch.grid_x = blocks_for(units, kNormThreads);
  launch_kernel(group_norm_merge_kernel<acc_t<scalar_t>>, launch, stream, units, p.taps() * p.out_plane(), parts, eps, scratch,
                a.mean, a.rstd);
}

// Writes mean and rstd too. scratch: group_norm_forward_scratch(p, parts) doubles.
template <class scalar_t>
void group_norm_aggregation_forward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps,
                                    scalar_t* y /* [N, G*C, Ho, Wo] */, const NormParts& parts, double* scratch,
                                    const DeviceNumbers& numbers, Stream stream) {
  launch_group_norm_statistics(p, a, eps, parts, scratch, stream);
  const NormWeights<scalar_t> weights = norm_weights(p, a);
  if (try_aggregation_direct(p, weights, a.w, a.x, y, stream)) return;
  if (try_aggregation_image(p, weights, a.w, a.x, y, numbers, stream)) return;
  if (!try_aggregation_tile<false>(p, weights, a.w, a.x, y, numbers, stream) &&
      !try_aggregation_pixels<false>(p, weights, a.w, a.x, y, stream))
    launch_aggregation_forward(p, weights, a.x, y, stream);
}

// ---- backward. With d the gradient of the normalised weights, xhat = (w - mean) * rstd and M = K * plane:
//     grad_beta = sum of d,  grad_gamma = sum of d * xhat,  over positions and images
//     grad_w = rstd * (gamma_t * d - (sum of gamma*d)/M - xhat * (sum of gamma*d*xhat)/M)
// d is computed twice, for the sums and for grad_w: memory for it would cost more than it saves.

// A block owns one tap of one group: sums of d and d * xhat over the map.
template <class scalar_t>
COTNET_KERNEL(kNormThreads, 1)
group_norm_sums_kernel(const AggregationProblem p, const NormWeights<scalar_t> weights,
                       const scalar_t* grad_y /* [N, G*C, Ho, Wo] */, const scalar_t* x /* [N, C, H, W] */,
                       double* sums /* [N, G*Cw, K, 2] */) {
  using acc = acc_t<scalar_t>;
  COTNET_SHARED(double, warps, kNormThreads / 32);
  int64_t rest = int64_t(blockIdx.x);
  const int64_t tap = split(rest, p.taps()), m = split(rest, p.weight_channels), head = split(rest, p.heads);
  const int64_t u = tap / p.cols.kernel, v = tap - u * p.cols.kernel, plane = p.out_plane();
  LongSum<acc> sum, sum_normed;
  for (int64_t q = threadIdx.x; q < plane; q += kNormThreads) {
    const acc d = WindowGradient<scalar_t>(p, rest, head, m, q, grad_y, x)(u, v);
    const auto window = weights.open({rest, head * p.weight_channels + m, p.heads * p.weight_channels, q, plane, p.taps()});
    sum.add(d);
    sum_normed.add(d * window.normed(tap));
  }
  const double total = block_sum<kNormThreads>(sum.total(), warps), normed = block_sum<kNormThreads>(sum_normed.total(), warps);
  if (threadIdx.x == 0) store_vec(sums + 2 * int64_t(blockIdx.x), Pack<double, 2>{{total, normed}});
}

// A thread owns one group: means over the group of gamma * d and gamma * d * xhat.
template <class scalar_t>
COTNET_KERNEL(kNormThreads, 1)
group_norm_means_kernel(const AggregationProblem p, const scalar_t* gamma /* [G*Cw*K] or null */,
                        const double* sums /* [N, G*Cw, K, 2] */, double* means /* [N, G*Cw, 2] */) {
  const int64_t unit = int64_t(blockIdx.x) * kNormThreads + threadIdx.x, groups = p.heads * p.weight_channels, taps = p.taps();
  if (unit >= p.batch * groups) return;
  double sum = 0, sum_normed = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const double scale = gamma ? double(load_wide(gamma + unit % groups * taps + t)) : 1.0;
    const Pack<double, 2> of_tap = load_vec<2>(sums + 2 * (unit * taps + t));
    sum += scale * of_tap.at[0];
    sum_normed += scale * of_tap.at[1];
  }
  const double size = double(taps * p.out_plane());
  store_vec(means + 2 * unit, Pack<double, 2>{{sum / size, sum_normed / size}});
}

// A thread owns one parameter: sums over images in order. Either gradient may be null.
template <class scalar_t>
COTNET_KERNEL(kNormThreads, 1)
group_norm_parameters_kernel(int64_t batch, int64_t parameters, const double* sums /* [N, G*Cw*K, 2] */,
                             scalar_t* grad_gamma /* [G*Cw*K] */, scalar_t* grad_beta /* [G*Cw*K] */) {
  const int64_t i = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (i >= parameters) return;
  double sum = 0, sum_normed = 0;
  for (int64_t n = 0; n < batch; ++n) {
    const Pack<double, 2> of_image = load_vec<2>(sums + 2 * (n * parameters + i));
    sum += of_image.at[0];
    sum_normed += of_image.at[1];
  }
  if (grad_beta) store_narrow(grad_beta + i, acc_t<scalar_t>(sum));
  if (grad_gamma) store_narrow(grad_gamma + i, acc_t<scalar_t>(sum_normed));
}

// A thread owns one number: sums over strips of the map in order.
template <class acc>
COTNET_KERNEL(kNormThreads, 1)
group_norm_strips_kernel(int64_t numbers, int strips, const double* parts /* [strips, numbers] */, double* sums /* [numbers] */) {
  const int64_t i = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (i >= numbers) return;
  double sum = 0;
  for (int strip = 0; strip < strips; ++strip) sum += load_vec<1>(parts + strip * numbers + i).at[0];
  store_vec(sums + i, Pack<double, 1>{{sum}});
}

template <class scalar_t>
struct NormSink {
  using acc = acc_t<scalar_t>;
  NormWeights<scalar_t> weights;
  const double* means;  // [N, G*Cw, 2]
  PlainSink<scalar_t> out;

  COTNET_DEVICE void write(const AggregationProblem& p, const WeightPlace& at, const WindowGradient<scalar_t>& gradient) const {
    const auto window = weights.open(at);
    const Pack<double, 2> known = load_vec<2>(means + 2 * at.unit());
    const acc mean = acc(known.at[0]), mean_normed = acc(known.at[1]);
    scalar_t* const to = out.grad_w + at.offset(out.strides);
    for (int64_t u = 0, t = 0; u < p.rows.kernel; ++u)
      for (int64_t v = 0; v < p.cols.kernel; ++v, ++t) {
        const acc centred = fma(window.scale(t), gradient(u, v), -mean);
        store_narrow(to + t * out.strides.tap, window.rstd * fma(-window.normed(t), mean_normed, centred));
      }
  }
};

// Sums over strips of the map, where there are several, become those of the map.
template <class scalar_t>
void launch_group_norm_strips(const AggregationProblem& p, int strips, const double* parts, double* sums, Stream stream) {
  if (strips == 1) return;
  const int64_t count = 2 * p.batch * p.heads * p.weight_channels * p.taps();
  Launch launch;
  launch.threads = kNormThreads;
  launch.grid_x = blocks_for(count, kNormThreads);
  launch_kernel(group_norm_strips_kernel<acc_t<scalar_t>>, launch, stream, count, strips, parts, sums);
}

// Sums of d and d * xhat for each tap of each group, [N, G*Cw, K, 2], and grad_x unless it is null. True when grad_w is done as
// well, unless null: where a block has the sums of whole maps at hand.
template <class scalar_t>
bool launch_group_norm_sums(const AggregationProblem& p, const NormWeights<scalar_t>& weights, const scalar_t* grad_y,
                            const scalar_t* x, scalar_t* grad_x, scalar_t* grad_w, double* sums, double* parts,
                            const DeviceNumbers& numbers, Stream stream) {
  const auto try_both = [&](auto kind, int strips) {
    kind.sums = {weights, strips > 1 ? parts : sums};
    if (!try_aggregation_tile_backward(p, kind, weights.raw.w, grad_y, x, grad_x, grad_w, numbers, stream)) return false;
    launch_group_norm_strips<scalar_t>(p, strips, parts, sums, stream);
    return true;
  };
  if (grad_x && grad_w && try_both(NormBackward<scalar_t, true>{}, 1)) return true;
  if (grad_x && try_both(NormBackward<scalar_t, false>{}, group_norm_backward_strips(p, sizeof(scalar_t), numbers))) return false;
  if (grad_x && !try_aggregation_tile<true>(p, weights, weights.raw.w, grad_y, grad_x, numbers, stream) &&
      !try_aggregation_pixels<true>(p, weights, weights.raw.w, grad_y, grad_x, stream))
    launch_aggregation_grad_input(p, weights, grad_y, grad_x, stream);
  const int strips = group_norm_strips(p, sizeof(scalar_t), numbers);
  const NormSumsSink<scalar_t> sink{weights, strips > 1 ? parts : sums};
  scalar_t* const nothing = nullptr;
  if (try_aggregation_tile_grad_weight(p, sink, weights.raw.w, grad_y, x, nothing, numbers, stream)) {
    launch_group_norm_strips<scalar_t>(p, strips, parts, sums, stream);
    return false;
  }
  Launch launch;
  launch.threads = kNormThreads;
  launch.grid_x = unsigned(p.batch * p.heads * p.weight_channels * p.taps());
  launch_kernel(group_norm_sums_kernel<scalar_t>, launch, stream, p, weights, grad_y, x, sums);
  return false;
}

// All gradients on channels_last maps, when there are kernels for them: the sums from one, and the others from a second.
template <class scalar_t>
bool try_group_norm_image_backward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, const scalar_t* grad_y,
                                   scalar_t* grad_x, scalar_t* grad_w, scalar_t* grad_gamma, scalar_t* grad_beta,
                                   double* scratch, const DeviceNumbers& numbers, Stream stream) {
  const int64_t units = p.batch * p.heads * p.weight_channels, parameters = p.heads * p.weight_channels * p.taps();
  const NormWeights<scalar_t> weights = norm_weights(p, a);
  double* const means = scratch + 2 * units * p.taps();
  double* const parts = means + 2 * units;
  if (grad_w || grad_gamma || grad_beta) {
    const int strips = group_norm_strips(p, sizeof(scalar_t), numbers);
    if (!try_aggregation_image_sums(p, weights, grad_y, a.x, strips > 1 ? parts : scratch, numbers, stream)) return false;
    Launch launch;
    launch.threads = kNormThreads;
    launch.grid_x = blocks_for(units * 18, kNormThreads);
    if (strips > 1) launch_kernel(group_norm_strips_kernel<acc_t<scalar_t>>, launch, stream, units * 18, strips, parts, scratch);
    launch.grid_x = blocks_for(parameters, kNormThreads);
    if (grad_gamma || grad_beta)
      launch_kernel(group_norm_parameters_kernel<scalar_t>, launch, stream, p.batch, parameters, scratch, grad_gamma, grad_beta);
    launch.grid_x = blocks_for(units, kNormThreads);
    if (grad_w) launch_kernel(group_norm_means_kernel<scalar_t>, launch, stream, p, a.gamma, scratch, means);
  }
  if (!grad_x && !grad_w) return true;
  return try_aggregation_image_backward(p, weights, grad_y, a.x, a.w, grad_x, grad_w, numbers, stream, grad_w ? means : nullptr);
}

// Any gradient may be null. scratch: group_norm_backward_scratch doubles.
template <class scalar_t>
void group_norm_aggregation_backward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, const scalar_t* grad_y,
                                     scalar_t* grad_x, scalar_t* grad_w, scalar_t* grad_gamma, scalar_t* grad_beta,
                                     double* scratch, const DeviceNumbers& numbers, Stream stream) {
  if (try_group_norm_image_backward(p, a, grad_y, grad_x, grad_w, grad_gamma, grad_beta, scratch, numbers, stream)) return;
  const int64_t units = p.batch * p.heads * p.weight_channels, parameters = p.heads * p.weight_channels * p.taps();
  const NormWeights<scalar_t> weights = norm_weights(p, a);
  if (!grad_w && !grad_gamma && !grad_beta) {
    if (grad_x && !try_aggregation_tile<true>(p, weights, a.w, grad_y, grad_x, numbers, stream) &&
        !try_aggregation_pixels<true>(p, weights, a.w, grad_y, grad_x, stream))
      launch_aggregation_grad_input(p, weights, grad_y, grad_x, stream);
    return;
  }
  double* const means = scratch + 2 * units * p.taps();
  const bool done =
      launch_group_norm_sums(p, weights, grad_y, a.x, grad_x, grad_w, scratch, means + 2 * units, numbers, stream);
  Launch launch;
  launch.threads = kNormThreads;
  if (grad_gamma || grad_beta) {
    launch.grid_x = blocks_for(parameters, kNormThreads);
    launch_kernel(group_norm_parameters_kernel<scalar_t>, launch, stream, p.batch, parameters, scratch, grad_gamma, grad_beta);
  }
  if (!grad_w || done) return;
  launch.grid_x = blocks_for(units, kNormThreads);
  launch_kernel(group_norm_means_kernel<scalar_t>, launch, stream, p, a.gamma, scratch, means);
  const NormTileSink<scalar_t> sink{weights, means};
  if (!try_aggregation_tile_grad_weight(p, sink, a.w, grad_y, a.x, grad_w, numbers, stream))
    launch_aggregation_grad_weight(p, NormSink<scalar_t>{weights, means, {grad_w, weights.raw.strides}}, grad_y, a.x, stream);
}

}  // namespace cotnet
