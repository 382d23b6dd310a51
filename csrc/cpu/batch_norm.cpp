// BatchNorm, with or without ReLU: the statistics of the batch, forward and backward. On the CPU.
#define COTNET_LOOPS "cpu/batch_norm.h"
#include "cpu/foreach_target.h"

#include "host/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void statistics(const Operands&... operands) const {
    COTNET_ON_TARGET((norm_statistics), operands..., parallel);
  }

  template <class... Operands>
  void forward(const Operands&... operands) const {
    COTNET_ON_TARGET((norm_forward), operands..., parallel);
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    COTNET_ON_TARGET((norm_backward), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("batch_norm_statistics", TORCH_BOX(&host::batch_norm_statistics<Cpu>));
  m.impl("batch_norm", TORCH_BOX(&host::batch_norm<Cpu>));
  m.impl("batch_norm_backward", TORCH_BOX(&host::batch_norm_backward<Cpu>));
}
