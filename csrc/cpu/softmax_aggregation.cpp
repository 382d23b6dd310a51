// softmax_aggregation and its backward on the CPU.
#define COTNET_LOOPS "cpu/softmax_aggregation.h"
#include "cpu/foreach_target.h"

#include "host/softmax_aggregation.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    COTNET_ON_TARGET((softmax_aggregation_forward), operands..., parallel);
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    COTNET_ON_TARGET((softmax_aggregation_backward), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("softmax_aggregation", TORCH_BOX(&host::softmax_aggregation<Cpu>));
  m.impl("softmax_aggregation_backward", TORCH_BOX(&host::softmax_aggregation_backward<Cpu>));
}
