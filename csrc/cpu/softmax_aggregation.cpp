// softmax_aggregation and its backward on the CPU.
#define COTNET_LOOPS "cpu/softmax_aggregation.h"
#include "cpu/foreach_target.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/parallel.h"
#include "host/stable_compat.h"

namespace cotnet {
namespace {

Tensor softmax_aggregation_cpu(const Tensor& input, const Tensor& logits, const Sizes& kernel_size, const Sizes& stride,
                               const Sizes& padding, const Sizes& dilation, StringArgument padding_mode) {
  const auto p = aggregation_problem(input, logits, {kernel_size, stride, padding, dilation, take(padding_mode)});
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor l = weight_in_layout(logits, p);
  const Tensor y = empty_output(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((softmax_aggregation_forward), p, data<scalar_t>(x), data<scalar_t>(l), mutable_data<scalar_t>(y),
                     Parallel{});
  });
  return y;
}

std::tuple<Tensor, Tensor> softmax_aggregation_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& logits,
                                                            const Sizes& kernel_size, const Sizes& stride,
                                                            const Sizes& padding, const Sizes& dilation,
                                                            StringArgument padding_mode,
                                                            const std::vector<bool>& output_mask) {
  const auto p = aggregation_problem(input, logits, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_alike({{"input", &input}, {"grad", &grad}});
  check_grad(grad, p);
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor l = weight_in_layout(logits, p);
  const Tensor grad_input = output_mask[0] ? empty_grad_input(input, p) : no_grad(input);
  const Tensor grad_logits = output_mask[1] ? empty_grad_weight(input, p) : no_grad(input);
  dispatch_dtype(g, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((softmax_aggregation_backward), p, data<scalar_t>(g), data<scalar_t>(x), data<scalar_t>(l),
                     output_mask[0] ? mutable_data<scalar_t>(grad_input) : nullptr,
                     output_mask[1] ? mutable_data<scalar_t>(grad_logits) : nullptr, Parallel{});
  });
  return {grad_input, in_weight_order(grad_logits, p)};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  m.impl("softmax_aggregation", TORCH_BOX(&cotnet::softmax_aggregation_cpu));
  m.impl("softmax_aggregation_backward", TORCH_BOX(&cotnet::softmax_aggregation_backward_cpu));
}
