// Binds csrc/cuda/group_norm_aggregation_pool.cuh.
#include "cuda/group_norm_aggregation_pool.cuh"

#include "bindings.h"
#include "scratch.h"

COTNET_BINDINGS(m) {
  using namespace cotnet;
  using namespace cotnet::bindings;
  m.def("group_norm_aggregation_pool",
        [](const std::string& dtype, const py::tuple& problem, const py::tuple& device, const py::object& x, const py::object& w,
           const py::object& gamma, const py::object& beta, const py::object& shift, const py::object& k, double eps,
           const py::object& y, const py::object& means) {
          dispatch_dtype(dtype, [&](auto tag) {
            using scalar_t = typename decltype(tag)::type;
            using acc = acc_t<scalar_t>;
            const auto p = aggregation_problem(problem);
            const DeviceNumbers numbers = device_numbers(device);
            const NormParts parts = choose_group_norm_statistics(p, sizeof(scalar_t), numbers);
            const PoisonedScratch<double> doubles;
            const PoisonedScratch<acc> scratch;
            const int64_t groups = p.batch * p.heads * p.weight_channels;
            group_norm_aggregation_pool<scalar_t>(
                p, {in<scalar_t>(x), in<scalar_t>(w), in<scalar_t>(gamma), in<scalar_t>(beta), scratch(groups), scratch(groups)},
                eps, in<acc>(shift), in<scalar_t>(k), out<scalar_t>(y), out<acc>(means), parts,
                doubles(group_norm_forward_scratch(p, parts)), numbers, Stream{}, scratch);
          });
        });
}
