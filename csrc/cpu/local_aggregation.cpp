// local_aggregation and its gradients on the CPU.
#define COTNET_LOOPS "cpu/local_aggregation.h"
#include "cpu/foreach_target.h"

#include "host/local_aggregation.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    COTNET_ON_TARGET((local_aggregation_forward), operands..., parallel);
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    COTNET_ON_TARGET((local_aggregation_backward), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("local_aggregation", TORCH_BOX(&host::local_aggregation<Cpu>));
  m.impl("local_aggregation_grad_input", TORCH_BOX(&host::local_aggregation_grad_input<Cpu>));
  m.impl("local_aggregation_grad_weight", TORCH_BOX(&host::local_aggregation_grad_weight<Cpu>));
  m.impl("local_aggregation_backward", TORCH_BOX(&host::local_aggregation_backward<Cpu>));
}
