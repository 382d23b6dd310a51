// spatial_softmax_gate and its gradients on tensors. The gradient of `static` is the incoming gradient itself. A Device has
//     forward(p, x, v, s, y)
//     backward(p, g, x, v, grad_x, grad_v), which writes the gradients that are not null.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"

namespace cotnet::host {

template <class Device>
Tensor spatial_softmax_gate(const Tensor& logits, const Tensor& value, const Tensor& static_context) {
  const auto p = map_problem("spatial_softmax_gate", {{"logits", &logits}, {"value", &value}, {"static", &static_context}});
  const Device device(logits);
  const Tensor x = map_in_layout(logits, p.channels_last);
  const Tensor v = map_in_layout(value, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor y = empty_like_map(logits, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.forward(p, data<scalar_t>(x), data<scalar_t>(v), data<scalar_t>(s), mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> spatial_softmax_gate_backward(const Tensor& grad, const Tensor& logits, const Tensor& value,
                                                         const std::vector<bool>& output_mask) {
  const auto p = map_problem("spatial_softmax_gate_backward", {{"logits", &logits}, {"value", &value}, {"grad", &grad}});
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must be two booleans");
  const Device device(logits);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(logits, p.channels_last);
  const Tensor v = map_in_layout(value, p.channels_last);
  const auto output = [&](bool wanted) { return wanted ? empty_like_map(logits, p) : no_grad(logits); };
  const Tensor grad_logits = output(output_mask[0]), grad_value = output(output_mask[1]);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.backward(p, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(v), wanted_data<scalar_t>(output_mask[0], grad_logits),
                    wanted_data<scalar_t>(output_mask[1], grad_value));
  });
  return {grad_logits, grad_value};
}

}  // namespace cotnet::host
