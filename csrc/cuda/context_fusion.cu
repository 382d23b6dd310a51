// context_fusion and its gradients on CUDA.
#include "cuda/context_fusion.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/cuda_context.h"
#include "host/dispatch.h"

namespace cotnet {
namespace {

Tensor context_fusion_cuda(const Tensor& dynamic, const Tensor& static_context, const Tensor& logits) {
  const auto p = map_problem("context_fusion", {{"dynamic", &dynamic}, {"static", &static_context}});
  check_fusion_logits(dynamic, logits, p);
  const CudaContext context(dynamic);
  const Tensor d = map_in_layout(dynamic, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor l = torch::stable::contiguous(logits);
  const Tensor y = empty_map(dynamic, p.batch, p.channels, dynamic.size(2), dynamic.size(3), p.channels_last);
  dispatch_dtype(d, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    scalar_t* const result = mutable_data<scalar_t>(y);
    const bool aligned = are_aligned({data<scalar_t>(d), data<scalar_t>(s), result});
    const auto plan = choose_context_fusion_forward(p, sizeof(scalar_t), aligned, context.numbers);
    context_fusion_forward_launch(plan, data<scalar_t>(d), data<scalar_t>(s), data<scalar_t>(l), result, context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> context_fusion_backward_cuda(const Tensor& grad, const Tensor& dynamic,
                                                                const Tensor& static_context, const Tensor& logits,
                                                                const std::vector<bool>& output_mask) {
  const auto p =
      map_problem("context_fusion_backward", {{"dynamic", &dynamic}, {"static", &static_context}, {"grad", &grad}});
  check_fusion_logits(dynamic, logits, p);
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must be three booleans");
  const CudaContext context(dynamic);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor d = map_in_layout(dynamic, p.channels_last);
  const Tensor s = map_in_layout(static_context, p.channels_last);
  const Tensor l = torch::stable::contiguous(logits);
  const auto output = [&](bool wanted) {
    if (!wanted) return no_grad(dynamic);
    return empty_map(dynamic, p.batch, p.channels, dynamic.size(2), dynamic.size(3), p.channels_last);
  };
  const Tensor grad_dynamic = output(output_mask[0]), grad_static = output(output_mask[1]);
  const Tensor grad_logits =
      output_mask[2] ? empty_vector(logits, {p.batch, p.channels, 2}, logits.scalar_type()) : no_grad(logits);
  dispatch_dtype(d, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    scalar_t* const grad_d = output_mask[0] ? mutable_data<scalar_t>(grad_dynamic) : nullptr;
    scalar_t* const grad_s = output_mask[1] ? mutable_data<scalar_t>(grad_static) : nullptr;
    scalar_t* const grad_l = output_mask[2] ? mutable_data<scalar_t>(grad_logits) : nullptr;
    const bool aligned = are_aligned({data<scalar_t>(g), data<scalar_t>(d), data<scalar_t>(s), grad_d, grad_s});
    const auto plan = choose_context_fusion_backward(p, sizeof(scalar_t), aligned, context.numbers);
    const Tensor partial = empty_vector(logits, {grad_l ? plan.partial_sums() : 0},
                                        sizeof(scalar_t) == 8 ? ScalarType::Double : ScalarType::Float);
    context_fusion_backward_launch(plan, data<scalar_t>(g), data<scalar_t>(d), data<scalar_t>(s), data<scalar_t>(l), grad_d,
                                   grad_s, grad_l, mutable_data<acc_t<scalar_t>>(partial), context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_dynamic, grad_static, grad_logits};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  m.impl("context_fusion", TORCH_BOX(&cotnet::context_fusion_cuda));
  m.impl("context_fusion_backward", TORCH_BOX(&cotnet::context_fusion_backward_cuda));
}
