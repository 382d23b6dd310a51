// The end of a contextual layer on tensors, in one pass each way: norm, SiLU, pooling and fusion of both contexts. A Device has
//     pool(p, y0, k0, norm, static_norm, means)
//     blend(p, y0, k0, norm, static_norm, attention, y)
//     sums(p, g, y0, k0, norm, static_norm, sums)
//     backward(p, g, y0, norm_of, attention, pooled, sums, grad_dynamic, grad_static, grad_weight, grad_bias).
#pragma once

#include <tuple>

#include "core/norm_table.h"
#include "host/checks.h"
#include "host/dispatch.h"

namespace cotnet::host {

template <class Device>
Tensor batch_norm_fusion_pool(const Tensor& dynamic, const Tensor& static_context, const Tensor& norm,
                              const Tensor& static_norm) {
  const auto p = map_problem("batch_norm_fusion_pool", {{"dynamic", &dynamic}, {"static", &static_context}});
  const Device device(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor static_table = channel_table("static_norm", static_norm, dynamic, {3, p.channels});
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor means = empty_vector(dynamic, {p.batch, p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    device.pool(p, data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(static_table), mutable_data<acc>(means));
  });
  return means;
}

template <class Device>
Tensor batch_norm_fusion(const Tensor& dynamic, const Tensor& static_context, const Tensor& norm, const Tensor& static_norm,
                         const Tensor& attention) {
  const auto p = map_problem("batch_norm_fusion", {{"dynamic", &dynamic}, {"static", &static_context}});
  const Device device(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor static_table = channel_table("static_norm", static_norm, dynamic, {3, p.channels});
  const Tensor chances = channel_table("attention", attention, dynamic, {p.batch, 2, p.channels});
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor y = empty_like_map(dynamic, p);
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    device.blend(p, data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(static_table), data<acc>(chances),
                 mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
Tensor batch_norm_fusion_sums(const Tensor& grad, const Tensor& dynamic, const Tensor& static_context, const Tensor& norm,
                              const Tensor& static_norm) {
  const auto p =
      map_problem("batch_norm_fusion_sums", {{"dynamic", &dynamic}, {"static", &static_context}, {"grad", &grad}});
  const Device device(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor static_table = channel_table("static_norm", static_norm, dynamic, {3, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last);
  const Tensor y0 = map_in_layout(dynamic, p.channels_last), k0 = map_in_layout(static_context, p.channels_last);
  const Tensor sums = empty_vector(dynamic, {p.batch, 6, p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    device.sums(p, data<scalar_t>(g), data<scalar_t>(y0), data<scalar_t>(k0), data<acc>(table), data<acc>(static_table),
                mutable_data<acc>(sums));
  });
  return sums;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fusion_backward(const Tensor& grad, const Tensor& dynamic,
                                                                      const Tensor& norm, const Tensor& factor,
                                                                      const Tensor& attention, const Tensor& pooled,
                                                                      const Tensor& sums, bool batch) {
  const auto p = map_problem("batch_norm_fusion_backward", {{"dynamic", &dynamic}, {"grad", &grad}});
  const Device device(dynamic);
  const Tensor table = channel_table("norm", norm, dynamic, {3, p.channels});
  const Tensor factors = channel_table("factor", factor, dynamic, {p.channels});
  const Tensor chances = channel_table("attention", attention, dynamic, {p.batch, 2, p.channels});
  const Tensor through_pool = channel_table("pooled", pooled, dynamic, {p.batch, p.channels});
  const Tensor all_sums = channel_table("sums", sums, dynamic, {p.batch, 6, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), y0 = map_in_layout(dynamic, p.channels_last);
  const Tensor grad_dynamic = empty_like_map(dynamic, p), grad_static = empty_like_map(dynamic, p);
  const Tensor grad_weight = empty_vector(dynamic, {p.channels}, acc_dtype(dynamic));
  const Tensor grad_bias = empty_vector(dynamic, {p.channels}, acc_dtype(dynamic));
  dispatch_dtype(y0, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    const NormOf<acc> norm_of{data<acc>(table), data<acc>(factors), batch};
    device.backward(p, data<scalar_t>(g), data<scalar_t>(y0), norm_of, data<acc>(chances), data<acc>(through_pool),
                    data<acc>(all_sums), mutable_data<scalar_t>(grad_dynamic), mutable_data<scalar_t>(grad_static),
                    mutable_data<acc>(grad_weight), mutable_data<acc>(grad_bias));
  });
  return {grad_dynamic, grad_static, grad_weight, grad_bias};
}

}  // namespace cotnet::host
