#include "cuda/spatial_softmax_gate.cuh"

#include "bindings.h"

using namespace cotnet;
using namespace cotnet::bindings;

namespace {

// Poisoned, as the caching allocator hands out memory with anything in it.
template <class acc>
std::vector<acc> partial_sums(const GatePlan& plan) {
  return std::vector<acc>(size_t(plan.partial_sums()), std::numeric_limits<acc>::quiet_NaN());
}

py::dict describe(const GatePlan& plan) {
  py::dict d;
  d["path"] = plan.path == GatePath::kTile ? "tile" : plan.path == GatePath::kWhole ? "whole" : "split";
  d["grid"] = py::make_tuple(plan.launch.grid_x, plan.launch.grid_y, plan.launch.grid_z);
  d["threads"] = plan.launch.threads;
  d["shared_bytes"] = plan.launch.shared_bytes;
  d["aligned"] = plan.aligned;
  d["rows_per_block"] = plan.rows_per_block;
  d["team"] = 1 << plan.team_shift;
  d["teams_per_row"] = plan.teams_per_row;
  d["lanes"] = plan.lanes;
  d["slabs"] = plan.slabs;
  d["units"] = plan.units;
  d["chunks"] = plan.chunks;
  d["chunk"] = plan.chunk;
  d["kept"] = plan.kept;
  d["partial_sums"] = plan.partial_sums();
  return d;
}

void forward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& x,
             const py::object& v, const py::object& s, const py::object& y) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = are_aligned({in<scalar_t>(x), in<scalar_t>(v), in<scalar_t>(s), out<scalar_t>(y)});
    const auto choose = choose_spatial_softmax_gate_forward;
    const auto plan = choose(map_problem(problem), sizeof(scalar_t), aligned, device_numbers(device));
    auto partial = partial_sums<acc_t<scalar_t>>(plan);
    spatial_softmax_gate_forward_launch(plan, in<scalar_t>(x), in<scalar_t>(v), in<scalar_t>(s), out<scalar_t>(y),
                                        partial.data(), Stream{});
  });
}

void backward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& grad_y,
              const py::object& x, const py::object& v, const py::object& grad_x, const py::object& grad_v) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = are_aligned(
        {in<scalar_t>(grad_y), in<scalar_t>(x), in<scalar_t>(v), out<scalar_t>(grad_x), out<scalar_t>(grad_v)});
    const auto choose = grad_x.is_none() ? choose_spatial_softmax_gate_forward : choose_spatial_softmax_gate_backward;
    const auto plan = choose(map_problem(problem), sizeof(scalar_t), aligned, device_numbers(device));
    auto partial = partial_sums<acc_t<scalar_t>>(plan);
    spatial_softmax_gate_backward_launch(plan, in<scalar_t>(grad_y), in<scalar_t>(x), in<scalar_t>(v), out<scalar_t>(grad_x),
                                         out<scalar_t>(grad_v), partial.data(), Stream{});
  });
}

py::dict choose(const std::string& pass, const py::tuple& problem, int element_bytes, bool aligned,
                const py::tuple& device) {
  const auto chooser = pass == "forward" ? choose_spatial_softmax_gate_forward : choose_spatial_softmax_gate_backward;
  return describe(chooser(map_problem(problem), element_bytes, aligned, device_numbers(device)));
}

}  // namespace

COTNET_BINDINGS(m) {
  m.def("spatial_softmax_gate_forward", &forward);
  m.def("spatial_softmax_gate_backward", &backward);
  m.def("choose_spatial_softmax_gate", &choose);
}
