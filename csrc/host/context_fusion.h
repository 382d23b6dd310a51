// context_fusion and its gradients on tensors. A Device has
//     forward(p, d, s, logits, y)
//     backward(p, g, d, s, logits, grad_d, grad_s, grad_logits), which writes the gradients that are not null.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"

namespace cotnet::host {

template <class Device>
Tensor context_fusion(const Tensor& dynamic, const Tensor& static_context, const Tensor& logits) {
  const auto p = map_problem("context_fusion", {{"dynamic", &dynamic}, {"static", &static_context}});
  check_fusion_logits(dynamic, logits, p);
  const Device device(dynamic);
  const Tensor d = map_in_layout(dynamic, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor l = torch::stable::contiguous(logits);
  const Tensor y = empty_like_map(dynamic, p);
  dispatch_dtype(d, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    device.forward(p, data<scalar_t>(d), data<scalar_t>(s), data<scalar_t>(l), mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> context_fusion_backward(const Tensor& grad, const Tensor& dynamic,
                                                           const Tensor& static_context, const Tensor& logits,
                                                           const std::vector<bool>& output_mask) {
  const auto p = map_problem("context_fusion_backward", {{"dynamic", &dynamic}, {"static", &static_context}, {"grad", &grad}});
  check_fusion_logits(dynamic, logits, p);
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must be three booleans");
  const Device device(dynamic);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor d = map_in_layout(dynamic, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor l = torch::stable::contiguous(logits);
  const auto output = [&](bool wanted) { return wanted ? empty_like_map(dynamic, p) : no_grad(dynamic); };
  const Tensor grad_dynamic = output(output_mask[0]), grad_static = output(output_mask[1]);
  const Tensor grad_logits =
      output_mask[2] ? empty_vector(logits, {p.batch, p.channels, 2}, logits.scalar_type()) : no_grad(logits);
  dispatch_dtype(d, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto wanted = [&](int i, const Tensor& gradient) { return wanted_data<scalar_t>(output_mask[i], gradient); };
    device.backward(p, data<scalar_t>(g), data<scalar_t>(d), data<scalar_t>(s), data<scalar_t>(l), wanted(0, grad_dynamic),
                    wanted(1, grad_static), wanted(2, grad_logits));
  });
  return {grad_dynamic, grad_static, grad_logits};
}

}  // namespace cotnet::host
