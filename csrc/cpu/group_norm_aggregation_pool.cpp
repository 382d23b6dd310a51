// group_norm_aggregation with the SiLU and the pooling that follow it in a layer for evaluation. On the CPU.
#define COTNET_LOOPS "cpu/group_norm_aggregation_pool.h"
#include "cpu/foreach_target.h"

#include "host/group_norm_aggregation_pool.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void pool(const Operands&... operands) const {
    COTNET_ON_TARGET((group_norm_aggregation_pool), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("group_norm_aggregation_pool", TORCH_BOX(&host::group_norm_aggregation_pool<Cpu>));
}
