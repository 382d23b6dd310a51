// Binds csrc/cuda/softmax_aggregation.cuh.
#include "cuda/softmax_aggregation.cuh"

#include "bindings.h"

COTNET_BINDINGS(m) {
  using namespace cotnet;
  using namespace cotnet::bindings;
  m.def("softmax_aggregation", [](const std::string& dtype, const py::tuple& problem, const py::tuple& device,
                                  const py::object& x, const py::object& logits, const py::object& y) {
    dispatch_dtype(dtype, [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      softmax_aggregation_forward(aggregation_problem(problem), in<scalar_t>(x), in<scalar_t>(logits), out<scalar_t>(y),
                                  device_numbers(device), Stream{});
    });
  });
  m.def("softmax_aggregation_backward", [](const std::string& dtype, const py::tuple& problem, const py::tuple& device,
                                           const py::object& grad_y, const py::object& x, const py::object& logits,
                                           const py::object& grad_x, const py::object& grad_logits) {
    dispatch_dtype(dtype, [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      const auto p = aggregation_problem(problem);
      std::vector<acc_t<scalar_t>> scratch(size_t(softmax_scratch(p)), acc_t<scalar_t>(NAN));
      softmax_aggregation_backward(p, in<scalar_t>(grad_y), in<scalar_t>(x), in<scalar_t>(logits), out<scalar_t>(grad_x),
                                   out<scalar_t>(grad_logits), scratch.data(), device_numbers(device), Stream{});
    });
  });
}
