// spatial_softmax_gate and its gradients on the CPU. The gradient of `static` is the incoming gradient itself.
#define COTNET_LOOPS "cpu/spatial_softmax_gate.h"
#include "cpu/foreach_target.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/parallel.h"

namespace cotnet {
namespace {

Tensor spatial_softmax_gate_cpu(const Tensor& logits, const Tensor& value, const Tensor& static_context) {
  const auto p = map_problem("spatial_softmax_gate", {{"logits", &logits}, {"value", &value}, {"static", &static_context}});
  const Tensor x = map_in_layout(logits, p.channels_last);
  const Tensor v = map_in_layout(value, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor y = empty_map(logits, p.batch, p.channels, logits.size(2), logits.size(3), p.channels_last);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((spatial_softmax_gate_forward), p, data<scalar_t>(x), data<scalar_t>(v), data<scalar_t>(s),
                     mutable_data<scalar_t>(y), Parallel{});
  });
  return y;
}

std::tuple<Tensor, Tensor> spatial_softmax_gate_backward_cpu(const Tensor& grad, const Tensor& logits, const Tensor& value,
                                                             const std::vector<bool>& output_mask) {
  const auto p = map_problem("spatial_softmax_gate_backward", {{"logits", &logits}, {"value", &value}, {"grad", &grad}});
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must be two booleans");
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(logits, p.channels_last);
  const Tensor v = map_in_layout(value, p.channels_last);
  const auto output = [&](bool wanted) {
    return wanted ? empty_map(logits, p.batch, p.channels, logits.size(2), logits.size(3), p.channels_last) : no_grad(logits);
  };
  const Tensor grad_logits = output(output_mask[0]), grad_value = output(output_mask[1]);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((spatial_softmax_gate_backward), p, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(v),
                     output_mask[0] ? mutable_data<scalar_t>(grad_logits) : nullptr,
                     output_mask[1] ? mutable_data<scalar_t>(grad_value) : nullptr, Parallel{});
  });
  return {grad_logits, grad_value};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  m.impl("spatial_softmax_gate", TORCH_BOX(&cotnet::spatial_softmax_gate_cpu));
  m.impl("spatial_softmax_gate_backward", TORCH_BOX(&cotnet::spatial_softmax_gate_backward_cpu));
}
