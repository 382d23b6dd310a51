// context_fusion and its gradients on the CPU.
#define COTNET_LOOPS "cpu/context_fusion.h"
#include "cpu/foreach_target.h"

#include "host/context_fusion.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    COTNET_ON_TARGET((context_fusion_forward), operands..., parallel);
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    COTNET_ON_TARGET((context_fusion_backward), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("context_fusion", TORCH_BOX(&host::context_fusion<Cpu>));
  m.impl("context_fusion_backward", TORCH_BOX(&host::context_fusion_backward<Cpu>));
}
