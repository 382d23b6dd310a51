// BatchNorm on tensors, with or without ReLU: the statistics of the batch, forward and backward. A Device has
//     statistics(p, x, weight, bias, eps, norm, factor, variance), where weight and bias may be null
//     forward(p, x, norm, relu, y)
//     backward(p, g, x, norm_of, relu, grad_x, grad_weight, grad_bias).
#pragma once

#include <tuple>

#include "core/norm_table.h"
#include "host/checks.h"
#include "host/dispatch.h"

namespace cotnet::host {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm_statistics(const Tensor& input, const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias, double eps) {
  const auto p = map_problem("batch_norm_statistics", {{"input", &input}});
  const Device device(input);
  const Tensor x = map_in_layout(input, p.channels_last);
  const auto gamma = optional_table("weight", weight, input, {p.channels});
  const auto beta = optional_table("bias", bias, input, {p.channels});
  const auto table = [&](const Sizes& sizes) { return empty_vector(input, sizes, acc_dtype(input)); };
  const Tensor norm = table({3, p.channels}), factor = table({p.channels}), variance = table({p.channels});
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    device.statistics(p, data<scalar_t>(x), gamma ? data<acc>(*gamma) : nullptr, beta ? data<acc>(*beta) : nullptr, eps,
                      mutable_data<acc>(norm), mutable_data<acc>(factor), mutable_data<acc>(variance));
  });
  return {norm, factor, variance};
}

template <class Device>
Tensor batch_norm(const Tensor& input, const Tensor& norm, bool relu) {
  const auto p = map_problem("batch_norm", {{"input", &input}});
  const Device device(input);
  const Tensor table = channel_table("norm", norm, input, {3, p.channels});
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor y = empty_like_map(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.forward(p, data<scalar_t>(x), data<acc_t<scalar_t>>(table), relu, mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& input, const Tensor& norm,
                                                       const Tensor& factor, bool relu, bool batch) {
  const auto p = map_problem("batch_norm_backward", {{"input", &input}, {"grad", &grad}});
  const Device device(input);
  const Tensor table = channel_table("norm", norm, input, {3, p.channels});
  const Tensor factors = channel_table("factor", factor, input, {p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), x = map_in_layout(input, p.channels_last);
  const Tensor grad_input = empty_like_map(input, p);
  const Tensor grad_weight = empty_vector(input, {p.channels}, acc_dtype(input));
  const Tensor grad_bias = empty_vector(input, {p.channels}, acc_dtype(input));
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    const NormOf<acc> norm_of{data<acc>(table), data<acc>(factors), batch};
    device.backward(p, data<scalar_t>(g), data<scalar_t>(x), norm_of, relu, mutable_data<scalar_t>(grad_input),
                    mutable_data<acc>(grad_weight), mutable_data<acc>(grad_bias));
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace cotnet::host
