#include "cuda/batch_norm_fusion.cuh"

#include "bindings.h"
#include "scratch.h"

using namespace cotnet;
using namespace cotnet::bindings;

namespace {

void pool(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& y0, const py::object& k0,
          const py::object& norm, const py::object& static_norm, const py::object& means) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_pool_launch(map_problem(problem), in<scalar_t>(y0), in<scalar_t>(k0), in<acc>(norm), in<acc>(static_norm),
                       out<acc>(means), device_numbers(device), Stream{}, PoisonedScratch<acc>());
  });
}

void blend(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& y0,
           const py::object& k0, const py::object& norm, const py::object& static_norm, const py::object& attention,
           const py::object& y) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_blend_launch(map_problem(problem), in<scalar_t>(y0), in<scalar_t>(k0), in<acc>(norm), in<acc>(static_norm),
                        in<acc>(attention), out<scalar_t>(y), device_numbers(device), Stream{});
  });
}

void sums(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& grad,
          const py::object& y0, const py::object& k0, const py::object& norm, const py::object& static_norm,
          const py::object& results) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    fusion_sums_launch(map_problem(problem), in<scalar_t>(grad), in<scalar_t>(y0), in<scalar_t>(k0), in<acc>(norm),
                       in<acc>(static_norm), out<acc>(results), device_numbers(device), Stream{}, PoisonedScratch<acc>());
  });
}

void backward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& grad,
              const py::object& y0, const py::object& norm, const py::object& factor, const py::object& attention,
              const py::object& pooled, const py::object& all_sums, bool batch, const py::object& grad_y0,
              const py::object& grad_r, const py::object& grad_weight, const py::object& grad_bias) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    const MapProblem p = map_problem(problem);
    const PoisonedScratch<acc> scratch;
    fusion_backward_launch<scalar_t>(p, in<scalar_t>(grad), in<scalar_t>(y0), {in<acc>(norm), in<acc>(factor), batch},
                                     {in<acc>(attention), in<acc>(pooled), in<acc>(all_sums)}, out<scalar_t>(grad_y0),
                                     out<scalar_t>(grad_r), {scratch(5 * p.channels), out<acc>(grad_weight), out<acc>(grad_bias)},
                                     device_numbers(device), Stream{});
  });
}

py::dict describe(const SweepPlan& plan) {
  py::dict d = describe_maps(plan);
  d["pieces"] = plan.pieces;
  d["team"] = plan.team;
  return d;
}

template <class Pass>
py::dict choose_pass(const MapProblem& p, int element_bytes, const DeviceNumbers& device) {
  py::dict d = describe(choose_sweep(p, needs_of<Pass>(), element_bytes, true, device));
  d["items"] = needs_of<Pass>().items;
  return d;
}

py::dict choose(const std::string& pass, const py::tuple& problem, int element_bytes, const py::tuple& device) {
  const MapProblem p = map_problem(problem);
  const DeviceNumbers numbers = device_numbers(device);
  if (pass == "pool") return choose_pass<FusionPool>(p, element_bytes, numbers);
  if (pass == "blend") return choose_pass<FusionBlend>(p, element_bytes, numbers);
  if (pass == "sums") return choose_pass<FusionSums>(p, element_bytes, numbers);
  return choose_pass<FusionBackward>(p, element_bytes, numbers);
}

}  // namespace

COTNET_BINDINGS(m) {
  m.def("batch_norm_fusion_pool", &pool);
  m.def("batch_norm_fusion", &blend);
  m.def("batch_norm_fusion_sums", &sums);
  m.def("batch_norm_fusion_backward", &backward);
  m.def("choose_sweep", &choose);
}
