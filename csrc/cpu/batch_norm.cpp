// BatchNorm, with or without ReLU, in parts: statistics, forward, and both passes of the backward. On the CPU.
#define COTNET_LOOPS "cpu/batch_norm.h"
#include "cpu/foreach_target.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host/checks.h"
#include "host/dispatch.h"
#include "host/parallel.h"

namespace cotnet {
namespace {

std::tuple<Tensor, Tensor> batch_norm_statistics_cpu(const Tensor& input) {
  const auto p = map_problem("batch_norm_statistics", {{"input", &input}});
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor mean = empty_vector(input, {p.channels}, acc_dtype(input));
  const Tensor variance = empty_vector(input, {p.channels}, acc_dtype(input));
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    COTNET_ON_TARGET((norm_statistics), p, data<scalar_t>(x), mutable_data<acc>(mean), mutable_data<acc>(variance), Parallel{});
  });
  return {mean, variance};
}

Tensor batch_norm_cpu(const Tensor& input, const Tensor& norm, bool relu) {
  const auto p = map_problem("batch_norm", {{"input", &input}});
  const Tensor table = channel_table("norm", norm, input, {3, p.channels});
  const Tensor x = map_in_layout(input, p.channels_last);
  const Tensor y = empty_like_map(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((norm_forward), p, data<scalar_t>(x), data<acc_t<scalar_t>>(table), relu, mutable_data<scalar_t>(y),
                     Parallel{});
  });
  return y;
}

Tensor batch_norm_sums_cpu(const Tensor& grad, const Tensor& input, const Tensor& norm, bool relu) {
  const auto p = map_problem("batch_norm_sums", {{"input", &input}, {"grad", &grad}});
  const Tensor table = channel_table("norm", norm, input, {3, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), x = map_in_layout(input, p.channels_last);
  const Tensor sums = empty_vector(input, {p.batch, 2, p.channels}, acc_dtype(input));
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    COTNET_ON_TARGET((norm_sums), p, data<scalar_t>(g), data<scalar_t>(x), data<acc>(table), relu, mutable_data<acc>(sums),
                     Parallel{});
  });
  return sums;
}

Tensor batch_norm_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& norm, bool relu) {
  const auto p = map_problem("batch_norm_backward", {{"input", &input}, {"grad", &grad}});
  const Tensor table = channel_table("norm", norm, input, {5, p.channels});
  const Tensor g = map_in_layout(grad, p.channels_last), x = map_in_layout(input, p.channels_last);
  const Tensor grad_input = empty_like_map(input, p);
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    COTNET_ON_TARGET((norm_backward), p, data<scalar_t>(g), data<scalar_t>(x), data<acc_t<scalar_t>>(table), relu,
                     mutable_data<scalar_t>(grad_input), Parallel{});
  });
  return grad_input;
}

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&cotnet::batch_norm_statistics_cpu));
  m.impl("batch_norm", TORCH_BOX(&cotnet::batch_norm_cpu));
  m.impl("batch_norm_sums", TORCH_BOX(&cotnet::batch_norm_sums_cpu));
  m.impl("batch_norm_backward", TORCH_BOX(&cotnet::batch_norm_backward_cpu));
}
