#include "cuda/spatial_softmax_gate.cuh"

#include "bindings.h"
#include "scratch.h"

using namespace cotnet;
using namespace cotnet::bindings;

namespace {

py::dict describe(const GatePlan& plan) {
  py::dict d = describe_maps(plan);
  d["path"] = plan.path == GatePath::kTile ? "tile" : plan.path == GatePath::kWhole ? "whole" : "split";
  d["team"] = 1 << plan.team_shift;
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
    const PoisonedScratch<acc_t<scalar_t>> scratch;
    spatial_softmax_gate_forward_launch(plan, in<scalar_t>(x), in<scalar_t>(v), in<scalar_t>(s), out<scalar_t>(y),
                                        scratch(plan.partial_sums()), Stream{});
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
    const PoisonedScratch<acc_t<scalar_t>> scratch;
    spatial_softmax_gate_backward_launch(plan, in<scalar_t>(grad_y), in<scalar_t>(x), in<scalar_t>(v), out<scalar_t>(grad_x),
                                         out<scalar_t>(grad_v), scratch(plan.partial_sums()), Stream{});
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
