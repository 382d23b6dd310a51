// The torch-free C++ of csrc as a Python module, so that tests can compare it with NumPy.
// Functions work elementwise on arrays; 16-bit floats travel as their bits, in uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/types.h"
#include "core/window.h"

namespace py = pybind11;
using namespace cotnet;

PYBIND11_MODULE(cotnet_kernels, m) {
  m.doc() = "csrc/core on NumPy arrays";

  m.def("output_size", py::vectorize(output_size));
  m.def("reflected", py::vectorize(reflected));

  m.def("widen_half", py::vectorize([](uint16_t bits) { return widen(Half{bits}); }));
  m.def("widen_bfloat16", py::vectorize([](uint16_t bits) { return widen(BFloat16{bits}); }));
  m.def("narrow_half", py::vectorize([](float value) { return narrow<Half>(value).bits; }));
  m.def("narrow_bfloat16", py::vectorize([](float value) { return narrow<BFloat16>(value).bits; }));
}
