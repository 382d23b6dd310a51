// group_norm_aggregation_pool on tensors. A Device has
//     pool(p, operands, eps, shift, k, y, means), which writes the mean and rstd of the operands too; k may be null.
#pragma once

#include "host/group_norm_aggregation.h"

namespace cotnet::host {

// The map that is pooled together with the output: like it in everything, brought into its layout.
inline std::optional<Tensor> pooled_map(const Tensor& input, const AggregationProblem& p, const std::optional<Tensor>& map) {
  if (!map) return std::nullopt;
  check_alike({{"input", &input}, {"static", &*map}});
  check_shape("static", *map, {p.batch, p.heads * p.channels, p.rows.out, p.cols.out});
  return map_in_layout(*map, p.channels_last);
}

template <class Device>
std::tuple<Tensor, Tensor> group_norm_aggregation_pool(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    const Tensor& shift, const std::optional<Tensor>& static_context, double eps, const Sizes& kernel_size, const Sizes& stride,
    const Sizes& padding, const Sizes& dilation, StringArgument padding_mode) {
  const auto p = aggregation_problem(input, weight, {kernel_size, stride, padding, dilation, take(padding_mode)});
  check_parameters(input, p, norm_weight, norm_bias);
  const Device device(input);
  const Tensor shifts = channel_table("shift", shift, input, {p.heads * p.channels});
  const auto k = pooled_map(input, p, static_context);
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor w = weight_in_layout(weight, p);
  const auto gamma = dense(norm_weight), beta = dense(norm_bias);
  const Tensor mean = empty_vector(input, {p.batch, p.heads * p.weight_channels}, acc_dtype(input));
  const Tensor rstd = empty_vector(input, {p.batch, p.heads * p.weight_channels}, acc_dtype(input));
  const Tensor y = empty_output(input, p);
  const Tensor means = empty_vector(input, {p.batch, p.heads * p.channels}, acc_dtype(input));
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    device.pool(p, operands<scalar_t>(x, w, gamma, beta, mean, rstd), eps, data<acc>(shifts), k ? data<scalar_t>(*k) : nullptr,
                mutable_data<scalar_t>(y), mutable_data<acc>(means));
  });
  return {y, means};
}

}  // namespace cotnet::host
