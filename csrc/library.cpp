// The one list of operators: every schema of the namespace, what was built, and the (empty) Python module.
#ifdef TORCH_EXTENSION_NAME  // the Python module, not the library for C++ programs
#include <Python.h>
#endif
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

// Kernel size, stride, padding and dilation (rows, columns) and the padding mode, common to all aggregations.
#define WINDOW "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, str padding_mode"

STABLE_TORCH_LIBRARY(cotnet_ext, m) {
  m.def("local_aggregation(Tensor input, Tensor weight, " WINDOW ") -> Tensor");
  m.def("local_aggregation_grad_input(Tensor grad, Tensor weight, SymInt[2] input_size, " WINDOW ") -> Tensor");
  m.def("local_aggregation_grad_weight(Tensor grad, Tensor input, SymInt weight_channels, " WINDOW ") -> Tensor");
  m.def("local_aggregation_backward(Tensor grad, Tensor input, Tensor weight, " WINDOW ") -> (Tensor, Tensor)");

  m.def("softmax_aggregation(Tensor input, Tensor logits, " WINDOW ") -> Tensor");
  m.def("softmax_aggregation_backward(Tensor grad, Tensor input, Tensor logits, " WINDOW
        ", bool[2] output_mask) -> (Tensor, Tensor)");

  m.def("group_norm_aggregation(Tensor input, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, float eps, " WINDOW
        ") -> (Tensor output, Tensor mean, Tensor rstd)");
  m.def("group_norm_aggregation_backward(Tensor grad, Tensor input, Tensor weight, Tensor mean, Tensor rstd, "
        "Tensor? norm_weight, Tensor? norm_bias, " WINDOW ", bool[4] output_mask, float eps)"
        " -> (Tensor, Tensor, Tensor, Tensor)");

  // shift [G*C] has the type of sums, and so have the means [N, G*C].
  m.def("group_norm_aggregation_pool(Tensor input, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor shift, "
        "Tensor? static, float eps, " WINDOW ") -> (Tensor output, Tensor means)");

  m.def("spatial_softmax_gate(Tensor logits, Tensor value, Tensor static) -> Tensor");
  m.def("spatial_softmax_gate_backward(Tensor grad, Tensor logits, Tensor value, bool[2] output_mask) -> (Tensor, Tensor)");

  m.def("context_fusion(Tensor dynamic, Tensor static, Tensor logits) -> Tensor");
  m.def("context_fusion_backward(Tensor grad, Tensor dynamic, Tensor static, Tensor logits, bool[3] output_mask)"
        " -> (Tensor, Tensor, Tensor)");

  // Numbers of channels have the type of sums. norm [3, C]: m, a, b of (x - m)*a + b; factor [C]: 1/sqrt(variance + eps).
  m.def("batch_norm_statistics(Tensor input, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor norm, Tensor factor, Tensor variance)");
  m.def("batch_norm(Tensor input, Tensor norm, bool relu) -> Tensor");
  m.def("batch_norm_backward(Tensor grad, Tensor input, Tensor norm, Tensor factor, bool relu, bool batch)"
        " -> (Tensor, Tensor, Tensor)");

  m.def("batch_norm_fusion_pool(Tensor dynamic, Tensor static, Tensor norm, Tensor static_norm) -> Tensor");
  m.def("batch_norm_fusion(Tensor dynamic, Tensor static, Tensor norm, Tensor static_norm, Tensor attention) -> Tensor");
  m.def("batch_norm_fusion_sums(Tensor grad, Tensor dynamic, Tensor static, Tensor norm, Tensor static_norm) -> Tensor");
  m.def("batch_norm_fusion_backward(Tensor grad, Tensor dynamic, Tensor norm, Tensor factor, Tensor attention, Tensor pooled, "
        "Tensor sums, bool batch) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def("build_info() -> str");
}

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifndef COTNET_EXT_VERSION
#define COTNET_EXT_VERSION "unknown"
#endif
#ifndef COTNET_EXT_CUDA_VERSION
#define COTNET_EXT_CUDA_VERSION ""
#endif
#ifndef COTNET_EXT_CUDA_ARCHS
#define COTNET_EXT_CUDA_ARCHS ""
#endif
#ifndef COTNET_EXT_TORCH_TARGET
#define COTNET_EXT_TORCH_TARGET "unknown"
#endif

// One "key=value" a line; cotnet_ext.build_info() makes a dict of it.
std::string build_info() {
  return std::string("version=" COTNET_EXT_VERSION "\ncuda_version=" COTNET_EXT_CUDA_VERSION
                     "\ncuda_archs=" COTNET_EXT_CUDA_ARCHS "\ntorch_target=" COTNET_EXT_TORCH_TARGET
                     "\ncompiler=") +
         kCompiler + "\ncpu_capability=" + cotnet::capability_name(cotnet::cpu_capability());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

#ifdef TORCH_EXTENSION_NAME
// Importing the module loads the library, and with it the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
