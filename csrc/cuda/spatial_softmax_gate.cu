// spatial_softmax_gate and its gradients on CUDA. The gradient of `static` is the incoming gradient itself.
#include "cuda/spatial_softmax_gate.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/cuda_context.h"
#include "host/dispatch.h"

namespace cotnet {
namespace {

// Room for the sums of chunks.
Tensor partial_sums(const Tensor& like, const GatePlan& plan) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return empty_vector(like, {plan.partial_sums()}, wide ? ScalarType::Double : ScalarType::Float);
}

Tensor spatial_softmax_gate_cuda(const Tensor& logits, const Tensor& value, const Tensor& static_context) {
  const auto p = map_problem("spatial_softmax_gate", {{"logits", &logits}, {"value", &value}, {"static", &static_context}});
  const CudaContext context(logits);
  const Tensor x = map_in_layout(logits, p.channels_last);
  const Tensor v = map_in_layout(value, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor y = empty_map(logits, p.batch, p.channels, logits.size(2), logits.size(3), p.channels_last);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    scalar_t* const result = mutable_data<scalar_t>(y);
    const bool aligned = are_aligned({data<scalar_t>(x), data<scalar_t>(v), data<scalar_t>(s), result});
    const auto plan = choose_spatial_softmax_gate_forward(p, sizeof(scalar_t), aligned, context.numbers);
    const Tensor partial = partial_sums(x, plan);
    spatial_softmax_gate_forward_launch(plan, data<scalar_t>(x), data<scalar_t>(v), data<scalar_t>(s), result,
                                        mutable_data<acc_t<scalar_t>>(partial), context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

std::tuple<Tensor, Tensor> spatial_softmax_gate_backward_cuda(const Tensor& grad, const Tensor& logits, const Tensor& value,
                                                              const std::vector<bool>& output_mask) {
  const auto p = map_problem("spatial_softmax_gate_backward", {{"logits", &logits}, {"value", &value}, {"grad", &grad}});
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must be two booleans");
  const CudaContext context(logits);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(logits, p.channels_last);
  const Tensor v = map_in_layout(value, p.channels_last);
  const auto output = [&](bool wanted) {
    if (!wanted) return no_grad(logits);
    return empty_map(logits, p.batch, p.channels, logits.size(2), logits.size(3), p.channels_last);
  };
  const Tensor grad_logits = output(output_mask[0]), grad_value = output(output_mask[1]);
  if (!output_mask[0] && !output_mask[1]) return {grad_logits, grad_value};
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    scalar_t* const grad_x = output_mask[0] ? mutable_data<scalar_t>(grad_logits) : nullptr;
    scalar_t* const grad_v = output_mask[1] ? mutable_data<scalar_t>(grad_value) : nullptr;
    const bool aligned = are_aligned({data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(v), grad_x, grad_v});
    const auto choose = output_mask[0] ? choose_spatial_softmax_gate_backward : choose_spatial_softmax_gate_forward;
    const auto plan = choose(p, sizeof(scalar_t), aligned, context.numbers);
    const Tensor partial = partial_sums(x, plan);
    spatial_softmax_gate_backward_launch(plan, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(v), grad_x, grad_v,
                                         mutable_data<acc_t<scalar_t>>(partial), context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_logits, grad_value};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  m.impl("spatial_softmax_gate", TORCH_BOX(&cotnet::spatial_softmax_gate_cuda));
  m.impl("spatial_softmax_gate_backward", TORCH_BOX(&cotnet::spatial_softmax_gate_backward_cuda));
}
