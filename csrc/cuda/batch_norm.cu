// BatchNorm, with or without ReLU: the statistics of the batch, forward and backward. On CUDA.
#include "cuda/batch_norm.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/batch_norm_statistics.cuh"
#include "host/checks.h"
#include "host/cuda_context.h"
#include "host/cuda_scratch.h"
#include "host/dispatch.h"

namespace cotnet {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_statistics_cuda(const Tensor& input, const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& bias, double eps) {
  const auto p = map_problem("batch_norm_statistics", {{"input", &input}});
  const CudaContext context(input);
  const Tensor x = map_in_layout(input, p.channels_last);
  const auto gamma = optional_table("weight", weight, input, {p.channels});
  const auto beta = optional_table("bias", bias, input, {p.channels});
  const auto table = [&](const Sizes& sizes) { return empty_vector(input, sizes, acc_dtype(input)); };
  const Tensor norm = table({3, p.channels}), factor = table({p.channels}), variance = table({p.channels});
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    const NormOutputs<acc> outputs{gamma ? data<acc>(*gamma) : nullptr, beta ? data<acc>(*beta) : nullptr, eps,
                                   mutable_data<acc>(norm), mutable_data<acc>(factor), mutable_data<acc>(variance)};
    norm_statistics_launch(p, data<scalar_t>(x), outputs, context.numbers, context.stream, CudaScratch<acc>(input));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {norm, factor, variance};
}

Tensor batch_norm_cuda(const Tensor& input, const Tensor& norm, bool relu) {
  const auto p = map_problem("batch_norm", {{"input", &input}});
  const CudaContext context(input);
  const Tensor table = channel_table("norm", norm, input, {3, p.channels});
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor y = empty_like_map(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    norm_forward_launch(p, data<scalar_t>(x), data<acc_t<scalar_t>>(table), relu, mutable_data<scalar_t>(y), context.numbers,
                        context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_cuda(const Tensor& grad, const Tensor& input, const Tensor& norm,
                                                            const Tensor& factor, bool relu, bool batch) {
  const auto p = map_problem("batch_norm_backward", {{"input", &input}, {"grad", &grad}});
  const CudaContext context(input);
  const Tensor table = channel_table("norm", norm, input, {3, p.channels});
  const Tensor factors = channel_table("factor", factor, input, {p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), x = map_in_layout(input, p.channels_last);
  const Tensor grad_input = empty_like_map(input, p);
  const auto numbers = [&](const Sizes& sizes) { return empty_vector(input, sizes, acc_dtype(input)); };
  const Tensor grad_weight = numbers({p.channels}), grad_bias = numbers({p.channels}), backward = numbers({5, p.channels});
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    norm_backward_launch<scalar_t>(p, data<scalar_t>(g), data<scalar_t>(x), {data<acc>(table), data<acc>(factors), batch}, relu,
                                   mutable_data<scalar_t>(grad_input),
                                   {mutable_data<acc>(backward), mutable_data<acc>(grad_weight), mutable_data<acc>(grad_bias)},
                                   context.numbers, context.stream, CudaScratch<acc>(input));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&cotnet::batch_norm_statistics_cuda));
  m.impl("batch_norm", TORCH_BOX(&cotnet::batch_norm_cuda));
  m.impl("batch_norm_backward", TORCH_BOX(&cotnet::batch_norm_backward_cuda));
}
