// Binds csrc/cuda/group_norm_aggregation.cuh.
#include "cuda/group_norm_aggregation.cuh"

#include "bindings.h"

COTNET_BINDINGS(m) {
  using namespace cotnet;
  using namespace cotnet::bindings;
  // Mean and rstd are of the type that the dtype is summed in.
  m.def("group_norm_aggregation", [](const std::string& dtype, const py::tuple& problem, const py::tuple& device,
                                     const py::object& x, const py::object& w, const py::object& gamma, const py::object& beta,
                                     double eps, const py::object& y, const py::object& mean, const py::object& rstd) {
    dispatch_dtype(dtype, [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      using acc = acc_t<scalar_t>;
      const auto p = aggregation_problem(problem);
      const NormParts parts = choose_group_norm_statistics(p, sizeof(scalar_t), device_numbers(device));
      std::vector<double> scratch(size_t(group_norm_forward_scratch(p, parts)), NAN);
      group_norm_aggregation_forward<scalar_t>(
          p, {in<scalar_t>(x), in<scalar_t>(w), in<scalar_t>(gamma), in<scalar_t>(beta), out<acc>(mean), out<acc>(rstd)}, eps,
          out<scalar_t>(y), parts, scratch.data(), device_numbers(device), Stream{});
    });
  });
  m.def("group_norm_aggregation_backward",
        [](const std::string& dtype, const py::tuple& problem, const py::tuple& device, const py::object& grad_y,
           const py::object& x, const py::object& w, const py::object& gamma, const py::object& beta, const py::object& mean,
           const py::object& rstd, const py::object& grad_x, const py::object& grad_w, const py::object& grad_gamma,
           const py::object& grad_beta) {
          dispatch_dtype(dtype, [&](auto tag) {
            using scalar_t = typename decltype(tag)::type;
            using acc = acc_t<scalar_t>;
            const auto p = aggregation_problem(problem);
            std::vector<double> scratch(size_t(group_norm_backward_scratch(p, sizeof(scalar_t), device_numbers(device))), NAN);
            group_norm_aggregation_backward<scalar_t>(
                p, {in<scalar_t>(x), in<scalar_t>(w), in<scalar_t>(gamma), in<scalar_t>(beta), out<acc>(mean), out<acc>(rstd)},
                in<scalar_t>(grad_y), out<scalar_t>(grad_x), out<scalar_t>(grad_w), out<scalar_t>(grad_gamma),
                out<scalar_t>(grad_beta), scratch.data(), device_numbers(device), Stream{});
          });
        });
}
