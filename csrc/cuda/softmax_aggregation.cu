// softmax_aggregation and its backward on CUDA.
#include "cuda/softmax_aggregation.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "host/checks.h"
#include "host/cuda_context.h"
#include "host/dispatch.h"
#include "host/stable_compat.h"

namespace cotnet {
namespace {

Tensor softmax_aggregation_cuda(const Tensor& input, const Tensor& logits, const Sizes& kernel_size, const Sizes& stride,
                                const Sizes& padding, const Sizes& dilation, StringArgument padding_mode) {
  const auto p = aggregation_problem(input, logits, {kernel_size, stride, padding, dilation, take(padding_mode)});
  const CudaContext context(input);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor l = weight_in_layout(logits, p);
  const Tensor y = empty_output(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    softmax_aggregation_forward(p, data<scalar_t>(x), data<scalar_t>(l), mutable_data<scalar_t>(y), context.numbers,
                                context.stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor> softmax_aggregation_backward_cuda(const Tensor& grad, const Tensor& input, const Tensor& logits,
                                                             const Sizes& kernel_size, const Sizes& stride,
                                                             const Sizes& padding, const Sizes& dilation,
                                                             StringArgument padding_mode,
                                                             const std::vector<bool>& output_mask) {
  const auto p = aggregation_problem(input, logits, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_alike({{"input", &input}, {"grad", &grad}});
  check_grad(grad, p);
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must be two booleans");
  const CudaContext context(input);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor l = weight_in_layout(logits, p);
  const Tensor grad_input = output_mask[0] ? empty_grad_input(input, p) : no_grad(input);
  const Tensor grad_logits = output_mask[1] ? empty_grad_weight(input, p) : no_grad(input);
  const auto acc_dtype = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor scratch = empty_vector(input, {softmax_scratch(p)}, acc_dtype);
  dispatch_dtype(g, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    softmax_aggregation_backward(p, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(l),
                                 output_mask[0] ? mutable_data<scalar_t>(grad_input) : nullptr,
                                 output_mask[1] ? mutable_data<scalar_t>(grad_logits) : nullptr,
                                 mutable_data<acc_t<scalar_t>>(scratch), context.numbers, context.stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_input, grad_logits};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  m.impl("softmax_aggregation", TORCH_BOX(&cotnet::softmax_aggregation_cuda));
  m.impl("softmax_aggregation_backward", TORCH_BOX(&cotnet::softmax_aggregation_backward_cuda));
}
