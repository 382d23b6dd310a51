// The CUDA kernels as a Python module that runs them under the emulator.
#include "bindings.h"

PYBIND11_MODULE(cotnet_cuda_emulated, m) {
  namespace py = pybind11;
  using namespace cotnet::emulator;
  m.doc() = "csrc/cuda on NumPy arrays, emulated";
  py::register_exception<Error>(m, "Error");
  m.def("set_schedule", [](const std::string& name, uint64_t seed) {
    if (name != "forward" && name != "backward" && name != "random") throw py::value_error("unknown schedule " + name);
    machine().schedule = name == "forward" ? Schedule::forward : name == "backward" ? Schedule::backward : Schedule::random;
    machine().seed = seed;
  }, py::arg("name"), py::arg("seed") = 1, "Order of the turns of threads: forward, backward or random.");
  for (auto* bind : cotnet::bindings::all) bind(m);
}
