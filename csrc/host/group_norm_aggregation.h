// group_norm_aggregation and its backward on tensors. A Device has
//     forward(p, operands, eps, y), which writes the mean and rstd of the operands too
//     backward(p, operands, g, grad_x, grad_w, grad_gamma, grad_beta), which writes the gradients that are not null.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "core/operands.h"
#include "host/checks.h"
#include "host/dispatch.h"
#include "host/stable_compat.h"

namespace cotnet::host {

inline std::optional<Tensor> dense(const std::optional<Tensor>& vector) {
  return vector ? std::optional<Tensor>(torch::stable::contiguous(*vector)) : std::nullopt;
}

// Affine parameters are [G*Cw*K], of the dtype and on the device of the input.
inline void check_parameters(const Tensor& input, const AggregationProblem& p, const std::optional<Tensor>& norm_weight,
                             const std::optional<Tensor>& norm_bias) {
  const Sizes expected{p.heads * p.weight_channels * p.taps()};
  for (const auto& [name, parameter] : {std::pair("norm_weight", &norm_weight), std::pair("norm_bias", &norm_bias)}) {
    if (!*parameter) continue;
    check_alike({{"input", &input}, {name, &**parameter}});
    check_shape(name, **parameter, expected);
  }
}

inline void check_statistics(const Tensor& input, const AggregationProblem& p, const Tensor& mean, const Tensor& rstd) {
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    check_shape(name, *statistic, {p.batch, p.heads * p.weight_channels});
    STD_TORCH_CHECK(statistic->scalar_type() == acc_dtype(input) && statistic->is_cuda() == input.is_cuda() &&
                        statistic->get_device_index() == input.get_device_index(),
                    name, " must be as the forward returned it");
  }
}

template <class scalar_t>
GroupNormOperands<scalar_t> operands(const Tensor& x, const Tensor& w, const std::optional<Tensor>& gamma,
                                     const std::optional<Tensor>& beta, const Tensor& mean, const Tensor& rstd) {
  return {data<scalar_t>(x),
          data<scalar_t>(w),
          gamma ? data<scalar_t>(*gamma) : nullptr,
          beta ? data<scalar_t>(*beta) : nullptr,
          mutable_data<acc_t<scalar_t>>(mean),
          mutable_data<acc_t<scalar_t>>(rstd)};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> group_norm_aggregation(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    double eps, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
    StringArgument padding_mode) {
  const auto p = aggregation_problem(input, weight, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_parameters(input, p, norm_weight, norm_bias);
  const Device device(input);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor w = weight_in_layout(weight, p);
  const auto gamma = dense(norm_weight), beta = dense(norm_bias);
  const Tensor mean = empty_vector(input, {p.batch, p.heads * p.weight_channels}, acc_dtype(input));
  const Tensor rstd = empty_vector(input, {p.batch, p.heads * p.weight_channels}, acc_dtype(input));
  const Tensor y = empty_output(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.forward(p, operands<scalar_t>(x, w, gamma, beta, mean, rstd), eps, mutable_data<scalar_t>(y));
  });
  return {y, mean, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_aggregation_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Sizes& kernel_size,
    const Sizes& stride, const Sizes& padding, const Sizes& dilation, StringArgument padding_mode,
    const std::vector<bool>& output_mask, double) {
  const auto p = aggregation_problem(input, weight, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_parameters(input, p, norm_weight, norm_bias);
  check_alike({{"input", &input}, {"grad", &grad}});
  check_grad(grad, p);
  check_statistics(input, p, mean, rstd);
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask must be four booleans");
  const Device device(input);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor w = weight_in_layout(weight, p);
  const auto gamma = dense(norm_weight), beta = dense(norm_bias);
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  const Sizes parameters{p.heads * p.weight_channels * p.taps()};
  const Tensor grad_input = output_mask[0] ? empty_grad_input(input, p) : no_grad(input);
  const Tensor grad_weight = output_mask[1] ? empty_grad_weight(input, p) : no_grad(input);
  const Tensor grad_gamma = output_mask[2] ? empty_vector(input, parameters, input.scalar_type()) : no_grad(input);
  const Tensor grad_beta = output_mask[3] ? empty_vector(input, parameters, input.scalar_type()) : no_grad(input);
  dispatch_dtype(g, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto wanted = [&](int i, const Tensor& gradient) { return wanted_data<scalar_t>(output_mask[i], gradient); };
    device.backward(p, operands<scalar_t>(x, w, gamma, beta, means, rstds), data<scalar_t>(g), wanted(0, grad_input),
                    wanted(1, grad_weight), wanted(2, grad_gamma), wanted(3, grad_beta));
  });
  return {grad_input, in_weight_order(grad_weight, p), grad_gamma, grad_beta};
}

}  // namespace cotnet::host
