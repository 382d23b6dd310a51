// local_aggregation and its gradients on tensors: the closed bilinear family and its fused backward. A Device has
//     forward(p, x, w, y)
//     backward(p, g, x, w, grad_x, grad_w), which writes the gradients that are not null.
#pragma once

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/stable_compat.h"

namespace cotnet::host {

template <class Device>
Tensor local_aggregation(const Tensor& input, const Tensor& weight, const Sizes& kernel_size, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation, StringArgument padding_mode) {
  const auto p = aggregation_problem(input, weight, {kernel_size, stride, padding, dilation, take(padding_mode)});
  const Device device(input);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor w = weight_in_layout(weight, p);
  const Tensor y = empty_output(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.forward(p, data<scalar_t>(x), data<scalar_t>(w), mutable_data<scalar_t>(y));
  });
  return y;
}

// The gradients that have a tensor to go to.
template <class Device>
void local_aggregation_gradients(const Device& device, const AggregationProblem& p, const Tensor& grad, const Tensor* input,
                                 const Tensor* weight, Tensor* grad_input, Tensor* grad_weight) {
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = input ? map_in_layout(*input, p.channels_last) : g;
  const Tensor w = weight ? weight_in_layout(*weight, p) : g;
  dispatch_dtype(g, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    scalar_t* const grad_x = grad_input ? mutable_data<scalar_t>(*grad_input) : nullptr;
    scalar_t* const grad_w = grad_weight ? mutable_data<scalar_t>(*grad_weight) : nullptr;
    device.backward(p, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(w), grad_x, grad_w);
  });
}

template <class Device>
Tensor local_aggregation_grad_input(const Tensor& grad, const Tensor& weight, const Sizes& input_size, const Sizes& kernel_size,
                                    const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                    StringArgument padding_mode) {
  const auto p = grad_input_problem(grad, weight, input_size, {kernel_size, stride, padding, dilation, take(padding_mode)});
  const Device device(grad);
  Tensor grad_input = empty_grad_input(grad, p);
  local_aggregation_gradients(device, p, grad, nullptr, &weight, &grad_input, nullptr);
  return grad_input;
}

template <class Device>
Tensor local_aggregation_grad_weight(const Tensor& grad, const Tensor& input, int64_t weight_channels, const Sizes& kernel_size,
                                     const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                     StringArgument padding_mode) {
  const auto p = grad_weight_problem(grad, input, weight_channels, {kernel_size, stride, padding, dilation, take(padding_mode)});
  const Device device(grad);
  Tensor grad_weight = empty_grad_weight(grad, p);
  local_aggregation_gradients(device, p, grad, &input, nullptr, nullptr, &grad_weight);
  return grad_weight;
}

template <class Device>
std::tuple<Tensor, Tensor> local_aggregation_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                      const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                                                      const Sizes& dilation, StringArgument padding_mode) {
  const auto p = aggregation_problem(input, weight, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_alike({{"input", &input}, {"grad", &grad}});
  check_grad(grad, p);
  const Device device(input);
  Tensor grad_input = empty_grad_input(input, p);
  Tensor grad_weight = empty_grad_weight(input, p);
  local_aggregation_gradients(device, p, grad, &input, &weight, &grad_input, &grad_weight);
  return {grad_input, in_weight_order(grad_weight, p)};
}

}  // namespace cotnet::host
