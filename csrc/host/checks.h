// From tensors to problems: the shapes of every call are checked here, for both devices, and outputs allocated.
// Users meet the Python checks first, with the same rules and friendlier types; these protect direct calls.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "core/problem.h"

namespace cotnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// The window arguments of every aggregation op, as the schema hands them over.
struct Window {
  const Sizes& kernel_size;
  const Sizes& stride;
  const Sizes& padding;
  const Sizes& dilation;
  const std::string padding_mode;
};

// Problem of input [N, C, H, W] and weight [N, G, Cw, K, Ho, Wo], laid out as `input` is.
AggregationProblem aggregation_problem(const Tensor& input, const Tensor& weight, const Window& window);
// The same with grad [N, G*C, Ho, Wo] in place of one of the two; layout from `grad`.
AggregationProblem grad_input_problem(const Tensor& grad, const Tensor& weight, const Sizes& input_size, const Window& window);
AggregationProblem grad_weight_problem(const Tensor& grad, const Tensor& input, int64_t weight_channels, const Window& window);
// `grad` must be what the forward returned for `problem`.
void check_grad(const Tensor& grad, const AggregationProblem& problem);

// Problem of maps [N, C, H, W] of one shape, laid out as the first is.
MapProblem map_problem(const char* op, const std::vector<std::pair<const char*, const Tensor*>>& maps);
// The logits [N, C, 2] of context_fusion.
void check_fusion_logits(const Tensor& dynamic, const Tensor& logits, const MapProblem& problem);

// Numbers of channels that go with maps: of the type that sums have, on their device. Contiguous in what is returned.
ScalarType acc_dtype(const Tensor& map);
Tensor channel_table(const char* name, const Tensor& table, const Tensor& map, const Sizes& expected);
std::optional<Tensor> optional_table(const char* name, const std::optional<Tensor>& table, const Tensor& map, const Sizes& expected);

// All tensors share dtype and device with the first.
void check_alike(const std::vector<std::pair<const char*, const Tensor*>>& tensors);
void check_shape(const char* name, const Tensor& tensor, const Sizes& expected);

// Whether [N, C, H, W] strides mean channels_last; contiguous wins where both do.
bool is_channels_last(const Tensor& map);

// The tensor itself when it is already dense in the layout, otherwise a copy. Weights in tap-major order (problem.h) are for
// the CUDA kernels only.
Tensor map_in_layout(const Tensor& map, bool channels_last);
Tensor weight_in_layout(const Tensor& weight, const AggregationProblem& problem);

Tensor empty_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last);
Tensor empty_like_map(const Tensor& map, const MapProblem& problem);
Tensor empty_output(const Tensor& like, const AggregationProblem& problem);
Tensor empty_grad_input(const Tensor& like, const AggregationProblem& problem);
Tensor empty_grad_weight(const Tensor& like, const AggregationProblem& problem);
// The gradient of a weight is laid out as the weight: a copy where the CPU kernels left another order. Others as they are.
Tensor in_weight_order(const Tensor& grad_weight, const AggregationProblem& problem);
Tensor empty_vector(const Tensor& like, const Sizes& sizes, ScalarType dtype);
// What stands for a gradient that was not asked for.
Tensor no_grad(const Tensor& like);

template <class scalar_t>
const scalar_t* data(const Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.const_data_ptr());
}
template <class scalar_t>
scalar_t* mutable_data(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}
// Null for a gradient that was not asked for.
template <class scalar_t>
scalar_t* wanted_data(bool wanted, const Tensor& grad) {
  return wanted ? mutable_data<scalar_t>(grad) : nullptr;
}

}  // namespace cotnet
