#include "host/checks.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <sstream>

#include "core/window.h"

namespace cotnet {
namespace {

using torch::headeronly::MemoryFormat;

template <class Range>
std::string show(const Range& values) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const int64_t value : values) {
    text << separator << value;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

bool equal(const Tensor& tensor, const Sizes& sizes) {
  const auto own = tensor.sizes();
  return own.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), own.begin());
}

// Dense with dimensions nested in the given order, innermost first. Dimensions of size 1 may have any stride.
template <size_t kDims>
bool is_dense(const Tensor& tensor, const std::array<int, kDims>& order) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t expected = 1;
  for (const int dim : order) {
    if (sizes[dim] != 1 && strides[dim] != expected) return tensor.numel() == 0;
    expected *= sizes[dim];
  }
  return true;
}

Axis axis_of(const Window& window, int dim, int64_t in, int64_t out) {
  return {in, out, window.kernel_size[dim], window.stride[dim], window.padding[dim], window.dilation[dim]};
}

void check_window(const Window& window) {
  static constexpr int64_t largest = (int64_t(1) << 31) - 1;  // keeps every product of two sizes within 64 bits
  const auto check = [](const char* name, const Sizes& values, int64_t least) {
    STD_TORCH_CHECK(values.size() == 2 && std::min(values[0], values[1]) >= least &&
                        std::max(values[0], values[1]) <= largest,
                    name, " must be two integers from ", least, " to ", largest, ", got ", show(values));
  };
  check("kernel_size", window.kernel_size, 1);
  check("stride", window.stride, 1);
  check("padding", window.padding, 0);
  check("dilation", window.dilation, 1);
  STD_TORCH_CHECK(window.padding_mode == "zeros" || window.padding_mode == "reflect",
                  "padding_mode must be \"zeros\" or \"reflect\", got \"", window.padding_mode, "\"");
}

void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ", show(tensor.sizes()));
}

AggregationProblem make_problem(const Sizes& input, const Sizes& weight, const Window& window, bool channels_last) {
  check_window(window);
  AggregationProblem p;
  p.batch = input[0];
  p.channels = input[1];
  p.heads = weight[1];
  p.weight_channels = weight[2];
  p.reflect = window.padding_mode == "reflect";
  p.channels_last = channels_last;
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t out = output_size(input[2 + dim], window.kernel_size[dim], window.stride[dim], window.padding[dim],
                                    window.dilation[dim]);
    (dim == 0 ? p.rows : p.cols) = axis_of(window, dim, input[2 + dim], out);
    STD_TORCH_CHECK(out > 0, "kernel_size ", show(window.kernel_size), " with dilation ", show(window.dilation),
                    " does not fit into input of shape ", show(input), " with padding ", show(window.padding));
    STD_TORCH_CHECK(!p.reflect || window.padding[dim] < input[2 + dim], "padding must be smaller than input with padding_mode ",
                    "\"reflect\", got padding ", show(window.padding), " for input of shape ", show(input));
  }
  STD_TORCH_CHECK(p.channels > 0, "input must have at least one channel, got shape ", show(input));
  STD_TORCH_CHECK(p.heads > 0 && p.weight_channels > 0 && p.channels % p.weight_channels == 0 && weight[0] == p.batch &&
                      weight[3] == p.taps() && weight[4] == p.rows.out && weight[5] == p.cols.out,
                  "weight must be [", p.batch, ", G, Cw, ", p.taps(), ", ", p.rows.out, ", ", p.cols.out,
                  "] with Cw dividing ", p.channels, ", got ", show(weight));
  return p;
}

// Whether weights of channels_last maps are N, Ho, Wo, K, Cw in memory. The usual order wins where both hold
// (cotnet_ext/_checks.py agrees).
bool is_tap_major(const Tensor& weight) {
  return weight.size(1) == 1 && !is_dense<6>(weight, {3, 2, 1, 5, 4, 0}) && is_dense<6>(weight, {2, 3, 1, 5, 4, 0});
}

Tensor empty_tap_major(const Tensor& like, const AggregationProblem& p) {
  const Tensor map = empty_map(like, p.batch, p.weight_channels * p.taps(), p.rows.out, p.cols.out, true);
  const Tensor weight = torch::stable::view(map, {p.batch, 1, p.taps(), p.weight_channels, p.rows.out, p.cols.out});
  return torch::stable::transpose(weight, 2, 3);
}

Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }

}  // namespace

AggregationProblem aggregation_problem(const Tensor& input, const Tensor& weight, const Window& window) {
  check_dim("input", input, 4);
  check_dim("weight", weight, 6);
  check_alike({{"input", &input}, {"weight", &weight}});
  AggregationProblem p = make_problem(sizes_of(input), sizes_of(weight), window, is_channels_last(input));
  p.tap_major = p.channels_last && is_tap_major(weight);
  return p;
}

AggregationProblem grad_input_problem(const Tensor& grad, const Tensor& weight, const Sizes& input_size, const Window& window) {
  check_dim("grad", grad, 4);
  check_dim("weight", weight, 6);
  check_alike({{"grad", &grad}, {"weight", &weight}});
  static constexpr int64_t largest = int64_t(1) << 62;  // leaves room for the padding
  STD_TORCH_CHECK(input_size.size() == 2 && std::min(input_size[0], input_size[1]) >= 0 &&
                      std::max(input_size[0], input_size[1]) <= largest,
                  "input_size must be two sizes, got ", show(input_size));
  const int64_t heads = weight.size(1);
  STD_TORCH_CHECK(heads > 0 && grad.size(1) % heads == 0, "grad must have a multiple of ", heads, " channels, got shape ",
                  show(grad.sizes()));
  const Sizes input{grad.size(0), grad.size(1) / heads, input_size[0], input_size[1]};
  AggregationProblem p = make_problem(input, sizes_of(weight), window, is_channels_last(grad));
  p.tap_major = p.channels_last && is_tap_major(weight);
  check_grad(grad, p);
  return p;
}

AggregationProblem grad_weight_problem(const Tensor& grad, const Tensor& input, int64_t weight_channels, const Window& window) {
  check_dim("grad", grad, 4);
  check_dim("input", input, 4);
  check_alike({{"grad", &grad}, {"input", &input}});
  check_window(window);
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(channels > 0 && grad.size(1) % channels == 0, "grad must have a multiple of ", channels,
                  " channels, got shape ", show(grad.sizes()));
  const Sizes weight{input.size(0), grad.size(1) / channels, weight_channels, window.kernel_size[0] * window.kernel_size[1],
                     grad.size(2), grad.size(3)};
  const AggregationProblem p = make_problem(sizes_of(input), weight, window, is_channels_last(input));
  check_grad(grad, p);
  return p;
}

void check_grad(const Tensor& grad, const AggregationProblem& p) {
  check_shape("grad", grad, {p.batch, p.heads * p.channels, p.rows.out, p.cols.out});
}

MapProblem map_problem(const char* op, const std::vector<std::pair<const char*, const Tensor*>>& maps) {
  check_alike(maps);
  const Tensor& first = *maps.front().second;
  STD_TORCH_CHECK(first.dim() == 4, op, ": ", maps.front().first, " must be [N, C, H, W], got shape ", show(first.sizes()));
  for (const auto& [name, map] : maps) check_shape(name, *map, sizes_of(first));
  return {first.size(0), first.size(1), first.size(2) * first.size(3), is_channels_last(first)};
}

void check_fusion_logits(const Tensor& dynamic, const Tensor& logits, const MapProblem& p) {
  check_alike({{"dynamic", &dynamic}, {"logits", &logits}});
  check_shape("logits", logits, {p.batch, p.channels, 2});
}

ScalarType acc_dtype(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor channel_table(const char* name, const Tensor& table, const Tensor& map, const Sizes& expected) {
  STD_TORCH_CHECK(table.scalar_type() == acc_dtype(map), name, " must be ",
                  acc_dtype(map) == ScalarType::Double ? "float64" : "float32");
  STD_TORCH_CHECK(table.is_cuda() == map.is_cuda() && table.get_device_index() == map.get_device_index(), name,
                  " must be on the device of the maps");
  check_shape(name, table, expected);
  return torch::stable::contiguous(table);
}

std::optional<Tensor> optional_table(const char* name, const std::optional<Tensor>& table, const Tensor& map,
                                     const Sizes& expected) {
  if (!table) return std::nullopt;
  return channel_table(name, *table, map, expected);
}

void check_alike(const std::vector<std::pair<const char*, const Tensor*>>& tensors) {
  const auto& [first_name, first] = tensors.front();
  const ScalarType dtype = first->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  first_name, " must be float64, float32, float16 or bfloat16");
  for (const auto& [name, tensor] : tensors) {
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " must have the dtype of ", first_name);
    STD_TORCH_CHECK(tensor->is_cuda() == first->is_cuda() && tensor->get_device_index() == first->get_device_index(), name,
                    " must be on the device of ", first_name);
  }
}

void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  STD_TORCH_CHECK(equal(tensor, expected), name, " must be ", show(expected), ", got ", show(tensor.sizes()));
}

bool is_channels_last(const Tensor& map) {
  if (is_dense<4>(map, {3, 2, 1, 0})) return false;
  // PyTorch's own rule for reading a memory format off strides (c10/core/MemoryFormat.h): they grow in the order
  // C, W, H, N, and ambiguous shapes count as NCHW.
  const auto sizes = map.sizes();
  const auto strides = map.strides();
  int64_t least = 0;
  if (strides[1] == 0) return false;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 0 || strides[dim] < least || (dim == 0 && least == strides[1])) return false;
    least = sizes[dim] > 1 ? strides[dim] * sizes[dim] : strides[dim];
  }
  return true;
}

Tensor map_in_layout(const Tensor& map, bool channels_last) {
  if (channels_last ? is_dense<4>(map, {1, 3, 2, 0}) : is_dense<4>(map, {3, 2, 1, 0})) return map;
  return torch::stable::contiguous(map, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor weight_in_layout(const Tensor& weight, const AggregationProblem& p) {
  if (p.tap_major && weight.is_cuda()) return weight;
  if (p.channels_last ? is_dense<6>(weight, {3, 2, 1, 5, 4, 0}) : is_dense<6>(weight, {5, 4, 3, 2, 1, 0})) return weight;
  const Sizes s = sizes_of(weight);
  const Tensor map = torch::stable::reshape(weight, {s[0], s[1] * s[2] * s[3], s[4], s[5]});
  return torch::stable::view(map_in_layout(map, p.channels_last), {s[0], s[1], s[2], s[3], s[4], s[5]});
}

Tensor empty_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor empty_like_map(const Tensor& map, const MapProblem& p) {
  return empty_map(map, p.batch, p.channels, map.size(2), map.size(3), p.channels_last);
}

Tensor empty_output(const Tensor& like, const AggregationProblem& p) {
  return empty_map(like, p.batch, p.heads * p.channels, p.rows.out, p.cols.out, p.channels_last);
}

Tensor empty_grad_input(const Tensor& like, const AggregationProblem& p) {
  return empty_map(like, p.batch, p.channels, p.rows.in, p.cols.in, p.channels_last);
}

Tensor empty_grad_weight(const Tensor& like, const AggregationProblem& p) {
  if (p.tap_major && like.is_cuda()) return empty_tap_major(like, p);
  const Tensor map = empty_map(like, p.batch, p.heads * p.weight_channels * p.taps(), p.rows.out, p.cols.out, p.channels_last);
  return torch::stable::view(map, {p.batch, p.heads, p.weight_channels, p.taps(), p.rows.out, p.cols.out});
}

Tensor in_weight_order(const Tensor& grad_weight, const AggregationProblem& p) {
  if (!p.tap_major || grad_weight.is_cuda() || grad_weight.dim() != 6) return grad_weight;
  Tensor ordered = empty_tap_major(grad_weight, p);
  return torch::stable::copy_(ordered, grad_weight);
}

Tensor empty_vector(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt, std::nullopt);
}

Tensor no_grad(const Tensor& like) { return empty_vector(like, {0}, like.scalar_type()); }

}  // namespace cotnet
