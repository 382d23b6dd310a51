#include "cuda/context_fusion.cuh"

#include "bindings.h"
#include "scratch.h"

using namespace cotnet;
using namespace cotnet::bindings;

namespace {

py::dict describe(const FusionPlan& plan) {
  py::dict d = describe_maps(plan);
  d["team"] = plan.team;
  d["partial_sums"] = plan.partial_sums();
  return d;
}

void forward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& d,
             const py::object& s, const py::object& logits, const py::object& y) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = are_aligned({in<scalar_t>(d), in<scalar_t>(s), out<scalar_t>(y)});
    const auto plan = choose_context_fusion_forward(map_problem(problem), sizeof(scalar_t), aligned, device_numbers(device));
    context_fusion_forward_launch(plan, in<scalar_t>(d), in<scalar_t>(s), in<scalar_t>(logits), out<scalar_t>(y), Stream{});
  });
}

void backward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& grad_y,
              const py::object& d, const py::object& s, const py::object& logits, const py::object& grad_d,
              const py::object& grad_s, const py::object& grad_logits) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = are_aligned(
        {in<scalar_t>(grad_y), in<scalar_t>(d), in<scalar_t>(s), out<scalar_t>(grad_d), out<scalar_t>(grad_s)});
    const auto choose = choose_context_fusion_backward;
    const auto plan = choose(map_problem(problem), sizeof(scalar_t), aligned, device_numbers(device));
    const PoisonedScratch<acc_t<scalar_t>> scratch;
    context_fusion_backward_launch(plan, in<scalar_t>(grad_y), in<scalar_t>(d), in<scalar_t>(s), in<scalar_t>(logits),
                                   out<scalar_t>(grad_d), out<scalar_t>(grad_s), out<scalar_t>(grad_logits),
                                   scratch(plan.partial_sums()), Stream{});
  });
}

py::dict choose(const std::string& pass, const py::tuple& problem, int element_bytes, bool aligned,
                const py::tuple& device) {
  const auto chooser = pass == "forward" ? choose_context_fusion_forward : choose_context_fusion_backward;
  return describe(chooser(map_problem(problem), element_bytes, aligned, device_numbers(device)));
}

}  // namespace

COTNET_BINDINGS(m) {
  m.def("context_fusion_forward", &forward);
  m.def("context_fusion_backward", &backward);
  m.def("choose_context_fusion", &choose);
}
