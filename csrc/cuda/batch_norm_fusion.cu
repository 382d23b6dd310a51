// The end of a contextual layer in one pass each way: norm, SiLU, pooling and fusion of both contexts. On CUDA.
#include "cuda/batch_norm_fusion.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host/checks.h"
#include "host/cuda_context.h"
#include "host/cuda_scratch.h"
#include "host/dispatch.h"

namespace cotnet {
namespace {

Tensor batch_norm_fusion_pool_cuda(const Tensor& dynamic, const Tensor& static_context, const Tensor& norm,
                                   const Tensor& static_norm) {
  const auto p = map_problem("batch_norm_fusion_pool", {{"dynamic", &dynamic}, {"static", &static_context}});
  const CudaContext context(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor static_table = channel_table("static_norm", static_norm, dynamic, {3, p.channels});
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor means = empty_vector(dynamic, {p.batch, p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_pool_launch(p, data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(static_table),
                       mutable_data<acc>(means), context.numbers, context.stream, CudaScratch<acc>(dynamic));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return means;
}

Tensor batch_norm_fusion_cuda(const Tensor& dynamic, const Tensor& static_context, const Tensor& norm, const Tensor& static_norm,
                              const Tensor& attention) {
  const auto p = map_problem("batch_norm_fusion", {{"dynamic", &dynamic}, {"static", &static_context}});
  const CudaContext context(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor static_table = channel_table("static_norm", static_norm, dynamic, {3, p.channels});
  const Tensor chances = channel_table("attention", attention, dynamic, {p.batch, 2, p.channels});
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor y = empty_like_map(dynamic, p);
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_blend_launch(p, data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(static_table), data<acc>(chances),
                        mutable_data<scalar_t>(y), context.numbers, context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

Tensor batch_norm_fusion_sums_cuda(const Tensor& grad, const Tensor& dynamic, const Tensor& static_context, const Tensor& norm,
                                   const Tensor& static_norm) {
  const auto p =
      map_problem("batch_norm_fusion_sums", {{"dynamic", &dynamic}, {"static", &static_context}, {"grad", &grad}});
  const CudaContext context(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor static_table = channel_table("static_norm", static_norm, dynamic, {3, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor sums = empty_vector(dynamic, {p.batch, 6, p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_sums_launch(p, data<scalar_t>(g), data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(static_table),
                       mutable_data<acc>(sums), context.numbers, context.stream, CudaScratch<acc>(dynamic));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fusion_backward_cuda(const Tensor& grad, const Tensor& dynamic,
                                                                           const Tensor& norm, const Tensor& factor,
                                                                           const Tensor& attention, const Tensor& pooled,
                                                                           const Tensor& sums, bool batch) {
  const auto p = map_problem("batch_norm_fusion_backward", {{"dynamic", &dynamic}, {"grad", &grad}});
  const CudaContext context(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor factors = channel_table("factor", factor, dynamic, {p.channels});
  const Tensor chances = channel_table("attention", attention, dynamic, {p.batch, 2, p.channels});
  const Tensor through_pool = channel_table("pooled", pooled, dynamic, {p.batch, p.channels});
  const Tensor all_sums = channel_table("sums", sums, dynamic, {p.batch, 6, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), y0 = map_in_layout(dynamic, p.channels_last);
  const Tensor grad_dynamic = empty_like_map(dynamic, p), grad_static = empty_like_map(dynamic, p);
  const auto numbers = [&](const Sizes& sizes) { return empty_vector(dynamic, sizes, acc_dtype(dynamic)); };
  const Tensor grad_weight = numbers({p.channels}), grad_bias = numbers({p.channels}), backward = numbers({5, p.channels});
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_backward_launch<scalar_t>(
        p, data<scalar_t>(g), data<scalar_t>(y0), {data<acc>(table), data<acc>(factors), batch},
        {data<acc>(chances), data<acc>(through_pool), data<acc>(all_sums)}, mutable_data<scalar_t>(grad_dynamic),
        mutable_data<scalar_t>(grad_static),
        {mutable_data<acc>(backward), mutable_data<acc>(grad_weight), mutable_data<acc>(grad_bias)}, context.numbers,
        context.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_dynamic, grad_static, grad_weight, grad_bias};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  m.impl("batch_norm_fusion_pool", TORCH_BOX(&cotnet::batch_norm_fusion_pool_cuda));
  m.impl("batch_norm_fusion", TORCH_BOX(&cotnet::batch_norm_fusion_cuda));
  m.impl("batch_norm_fusion_sums", TORCH_BOX(&cotnet::batch_norm_fusion_sums_cuda));
  m.impl("batch_norm_fusion_backward", TORCH_BOX(&cotnet::batch_norm_fusion_backward_cuda));
}
