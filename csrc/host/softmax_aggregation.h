// softmax_aggregation and its backward on tensors. A Device has
//     forward(p, x, logits, y)
//     backward(p, g, x, logits, grad_x, grad_logits), which writes the gradients that are not null.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/stable_compat.h"

namespace cotnet::host {

template <class Device>
Tensor softmax_aggregation(const Tensor& input, const Tensor& logits, const Sizes& kernel_size, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation, StringArgument padding_mode) {
  const auto p = aggregation_problem(input, logits, {kernel_size, stride, padding, dilation, take(padding_mode)});
  const Device device(input);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor l = weight_in_layout(logits, p);
  const Tensor y = empty_output(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.forward(p, data<scalar_t>(x), data<scalar_t>(l), mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> softmax_aggregation_backward(const Tensor& grad, const Tensor& input, const Tensor& logits,
                                                        const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                                                        const Sizes& dilation, StringArgument padding_mode,
                                                        const std::vector<bool>& output_mask) {
  const auto p = aggregation_problem(input, logits, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_alike({{"input", &input}, {"grad", &grad}});
  check_grad(grad, p);
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must be two booleans");
  const Device device(input);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor l = weight_in_layout(logits, p);
  const Tensor grad_input = output_mask[0] ? empty_grad_input(input, p) : no_grad(input);
  const Tensor grad_logits = output_mask[1] ? empty_grad_weight(input, p) : no_grad(input);
  dispatch_dtype(g, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.backward(p, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(l), wanted_data<scalar_t>(output_mask[0], grad_input),
                    wanted_data<scalar_t>(output_mask[1], grad_logits));
  });
  return {grad_input, in_weight_order(grad_logits, p)};
}

}  // namespace cotnet::host
