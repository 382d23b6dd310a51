// The end of a contextual layer in one pass each way: norm, SiLU, pooling and fusion of both contexts. On the CPU.
#define COTNET_LOOPS "cpu/batch_norm_fusion.h"
#include "cpu/foreach_target.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/parallel.h"

namespace cotnet {
namespace {

Tensor batch_norm_fusion_pool_cpu(const Tensor& dynamic, const Tensor& static_context, const Tensor& norms) {
  const auto p = map_problem("batch_norm_fusion_pool", {{"dynamic", &dynamic}, {"static", &static_context}});
  const Tensor table = channel_table("norms", norms, dynamic, {6, p.channels});
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor sums = empty_vector(dynamic, {p.batch, p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    COTNET_ON_TARGET((fusion_pool), p, data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), mutable_data<acc>(sums),
                     Parallel{});
  });
  return sums;
}

Tensor batch_norm_fusion_cpu(const Tensor& dynamic, const Tensor& static_context, const Tensor& norms, const Tensor& attention) {
  const auto p = map_problem("batch_norm_fusion", {{"dynamic", &dynamic}, {"static", &static_context}});
  const Tensor table = channel_table("norms", norms, dynamic, {6, p.channels});
  const Tensor chances = channel_table("attention", attention, dynamic, {p.batch, 2, p.channels});
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor y = empty_like_map(dynamic, p);
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    COTNET_ON_TARGET((fusion_blend), p, data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(chances),
                     mutable_data<scalar_t>(y), Parallel{});
  });
  return y;
}

Tensor batch_norm_fusion_sums_cpu(const Tensor& grad, const Tensor& dynamic, const Tensor& static_context, const Tensor& norms) {
  const auto p =
      map_problem("batch_norm_fusion_sums", {{"dynamic", &dynamic}, {"static", &static_context}, {"grad", &grad}});
  const Tensor table = channel_table("norms", norms, dynamic, {6, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor sums = empty_vector(dynamic, {p.batch, 6, p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    COTNET_ON_TARGET((fusion_sums), p, data<scalar_t>(g), data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table),
                     mutable_data<acc>(sums), Parallel{});
  });
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_fusion_backward_cpu(const Tensor& grad, const Tensor& dynamic, const Tensor& norm,
                                                          const Tensor& attention) {
  const auto p = map_problem("batch_norm_fusion_backward", {{"dynamic", &dynamic}, {"grad", &grad}});
  const Tensor table = channel_table("norm", norm, dynamic, {5, p.channels});
  const Tensor chances = channel_table("attention", attention, dynamic, {p.batch, 3, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), y0 = map_in_layout(dynamic, p.channels_last);
  const Tensor grad_dynamic = empty_like_map(dynamic, p), grad_static = empty_like_map(dynamic, p);
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    COTNET_ON_TARGET((fusion_backward), p, data<scalar_t>(g), data<scalar_t>(y0), data<acc>(table), data<acc>(chances),
                     mutable_data<scalar_t>(grad_dynamic), mutable_data<scalar_t>(grad_static), Parallel{});
  });
  return {grad_dynamic, grad_static};
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  m.impl("batch_norm_fusion_pool", TORCH_BOX(&cotnet::batch_norm_fusion_pool_cpu));
  m.impl("batch_norm_fusion", TORCH_BOX(&cotnet::batch_norm_fusion_cpu));
  m.impl("batch_norm_fusion_sums", TORCH_BOX(&cotnet::batch_norm_fusion_sums_cpu));
  m.impl("batch_norm_fusion_backward", TORCH_BOX(&cotnet::batch_norm_fusion_backward_cpu));
}
