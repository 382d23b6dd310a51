// What the files that bind the kernels of one op share. A file adds its functions with
//
//     COTNET_BINDINGS(m) { m.def("name", ...); }
//
// Arrays are NumPy's, dense, written in place where they are outputs. Their dtype is given as a word ("bfloat16"), as NumPy
// does not know all of them: only sizes of elements are compared.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/problem.h"
#include "core/types.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace cotnet::bindings {

namespace py = pybind11;

inline std::vector<void (*)(py::module_&)> all;
struct Adder {
  explicit Adder(void (*bind)(py::module_&)) { all.push_back(bind); }
};
#define COTNET_BINDINGS(m)                                  \
  static void bind(cotnet::bindings::py::module_& m);       \
  static const cotnet::bindings::Adder adder(&bind);        \
  static void bind([[maybe_unused]] cotnet::bindings::py::module_& m)

template <class T>
struct TypeTag {
  using type = T;
};

// body(TypeTag<scalar_t>{}) for a dtype by name.
template <class Body>
void dispatch_dtype(const std::string& dtype, const Body& body) {
  if (dtype == "float32") return body(TypeTag<float>{});
#if !defined(COTNET_FLOAT32_ONLY)  // for the builds of one test that compiles many
  if (dtype == "float64") return body(TypeTag<double>{});
  if (dtype == "float16") return body(TypeTag<Half>{});
  if (dtype == "bfloat16") return body(TypeTag<BFloat16>{});
#endif
  throw py::value_error("unknown dtype " + dtype);
}

template <class scalar_t>
scalar_t* pointer(const py::object& array, bool writable) {
  if (array.is_none()) return nullptr;
  const auto a = py::cast<py::array>(array);
  if (size_t(a.itemsize()) != sizeof(scalar_t)) throw py::value_error("elements of the wrong size");
  if (writable && !a.writeable()) throw py::value_error("a read-only output");
  return static_cast<scalar_t*>(const_cast<void*>(a.data()));
}
// None is null.
template <class scalar_t>
const scalar_t* in(const py::object& array) {
  return pointer<scalar_t>(array, false);
}
template <class scalar_t>
scalar_t* out(const py::object& array) {
  return pointer<scalar_t>(array, true);
}

// (in, out, kernel, stride, padding, dilation)
inline Axis axis(const py::tuple& t) {
  const auto at = [&](int i) { return t[size_t(i)].cast<int64_t>(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}
// (batch, channels, heads, weight channels, rows, columns, reflect, channels_last), and perhaps tap_major
inline AggregationProblem aggregation_problem(const py::tuple& t) {
  return {t[0].cast<int64_t>(),          t[1].cast<int64_t>(),          t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          axis(t[4].cast<py::tuple>()), axis(t[5].cast<py::tuple>()), t[6].cast<bool>(),    t[7].cast<bool>(),
          t.size() > 8 && t[8].cast<bool>()};
}
// (batch, channels, plane, channels_last)
inline MapProblem map_problem(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<bool>()};
}
// (multiprocessors, arch, bytes of shared memory)
inline DeviceNumbers device_numbers(const py::tuple& t) { return {t[0].cast<int>(), t[1].cast<int>(), t[2].cast<int>()}; }

// What all plans for maps say.
template <class Plan>
py::dict describe_maps(const Plan& plan) {
  py::dict d;
  d["grid"] = py::make_tuple(plan.launch.grid_x, plan.launch.grid_y, plan.launch.grid_z);
  d["threads"] = plan.launch.threads;
  d["shared_bytes"] = plan.launch.shared_bytes;
  d["aligned"] = plan.aligned;
  d["rows_per_block"] = plan.rows_per_block;
  d["teams_per_row"] = plan.teams_per_row;
  d["lanes"] = plan.lanes;
  d["slabs"] = plan.slabs;
  d["units"] = plan.units;
  d["chunks"] = plan.chunks;
  d["chunk"] = plan.chunk;
  return d;
}

}  // namespace cotnet::bindings
