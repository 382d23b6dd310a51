// spatial_softmax_gate and its gradients on the CPU.
#define COTNET_LOOPS "cpu/spatial_softmax_gate.h"
#include "cpu/foreach_target.h"

#include "host/spatial_softmax_gate.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    COTNET_ON_TARGET((spatial_softmax_gate_forward), operands..., parallel);
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    COTNET_ON_TARGET((spatial_softmax_gate_backward), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("spatial_softmax_gate", TORCH_BOX(&host::spatial_softmax_gate<Cpu>));
  m.impl("spatial_softmax_gate_backward", TORCH_BOX(&host::spatial_softmax_gate_backward<Cpu>));
}
