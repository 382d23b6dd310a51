// context_fusion and its gradients on the CPU.
#define COTNET_LOOPS "cpu/context_fusion.h"
#include "cpu/foreach_target.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/parallel.h"

namespace cotnet {
namespace {

Tensor context_fusion_cpu(const Tensor& dynamic, const Tensor& static_context, const Tensor& logits) {
  const auto p = map_problem("context_fusion", {{"dynamic", &dynamic}, {"static", &static_context}});
  check_fusion_logits(dynamic, logits, p);
  const Tensor d = map_in_layout(dynamic, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor l = torch::stable::contiguous(logits);
  const Tensor y = empty_map(dynamic, p.batch, p.channels, dynamic.size(2), dynamic.size(3), p.channels_last);
  dispatch_dtype(d, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((context_fusion_forward), p, data<scalar_t>(d), data<scalar_t>(s), data<scalar_t>(l),
                     mutable_data<scalar_t>(y), Parallel{});
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> context_fusion_backward_cpu(const Tensor& grad, const Tensor& dynamic,
                                                               const Tensor& static_context, const Tensor& logits,
                                                               const std::vector<bool>& output_mask) {
  const auto p = map_problem("context_fusion_backward", {{"dynamic", &dynamic}, {"static", &static_context}, {"grad", &grad}});
  check_fusion_logits(dynamic, logits, p);
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must be three booleans");
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor d = map_in_layout(dynamic, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor l = torch::stable::contiguous(logits);
  const auto output = [&](bool wanted) {
    return wanted ? empty_map(dynamic, p.batch, p.channels, dynamic.size(2), dynamic.size(3), p.channels_last) : no_grad(dynamic);
  };
  const Tensor grad_dynamic = output(output_mask[0]), grad_static = output(output_mask[1]);
  const Tensor grad_logits =
      output_mask[2] ? empty_vector(logits, {p.batch, p.channels, 2}, logits.scalar_type()) : no_grad(logits);
  dispatch_dtype(d, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((context_fusion_backward), p, data<scalar_t>(g), data<scalar_t>(d), data<scalar_t>(s), data<scalar_t>(l),
                     output_mask[0] ? mutable_data<scalar_t>(grad_dynamic) : nullptr,
                     output_mask[1] ? mutable_data<scalar_t>(grad_static) : nullptr,
                     output_mask[2] ? mutable_data<scalar_t>(grad_logits) : nullptr, Parallel{});
  });
  return {grad_dynamic, grad_static, grad_logits};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  m.impl("context_fusion", TORCH_BOX(&cotnet::context_fusion_cpu));
  m.impl("context_fusion_backward", TORCH_BOX(&cotnet::context_fusion_backward_cpu));
}
