#include "cuda/batch_norm.cuh"

#include "bindings.h"
#include "cuda/batch_norm_statistics.cuh"
#include "scratch.h"

using namespace cotnet;
using namespace cotnet::bindings;

namespace {

void statistics(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& x,
                const py::object& weight, const py::object& bias, double eps, const py::object& norm, const py::object& factor,
                const py::object& variance) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    const NormOutputs<acc> outputs{in<acc>(weight), in<acc>(bias),    eps,
                                   out<acc>(norm),  out<acc>(factor), out<acc>(variance)};
    norm_statistics_launch(map_problem(problem), in<scalar_t>(x), outputs, device_numbers(device), Stream{},
                           PoisonedScratch<acc>());
  });
}

void forward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& x,
             const py::object& norm, bool relu, const py::object& y) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    norm_forward_launch(map_problem(problem), in<scalar_t>(x), in<acc_t<scalar_t>>(norm), relu, out<scalar_t>(y),
                        device_numbers(device), Stream{});
  });
}

void backward(const py::tuple& problem, const std::string& dtype, const py::tuple& device, const py::object& grad,
              const py::object& x, const py::object& norm, const py::object& factor, bool relu, bool batch,
              const py::object& grad_x, const py::object& grad_weight, const py::object& grad_bias) {
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc = acc_t<scalar_t>;
    const MapProblem p = map_problem(problem);
    const PoisonedScratch<acc> scratch;
    norm_backward_launch<scalar_t>(p, in<scalar_t>(grad), in<scalar_t>(x), {in<acc>(norm), in<acc>(factor), batch}, relu,
                                   out<scalar_t>(grad_x), {scratch(5 * p.channels), out<acc>(grad_weight), out<acc>(grad_bias)},
                                   device_numbers(device), Stream{}, scratch);
  });
}

}  // namespace

COTNET_BINDINGS(m) {
  m.def("batch_norm_statistics", &statistics);
  m.def("batch_norm", &forward);
  m.def("batch_norm_backward", &backward);
}
