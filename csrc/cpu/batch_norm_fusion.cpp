// The end of a contextual layer in one pass each way: norm, SiLU, pooling and fusion of both contexts. On the CPU.
#define COTNET_LOOPS "cpu/batch_norm_fusion.h"
#include "cpu/foreach_target.h"

#include "host/batch_norm_fusion.h"

#include <torch/csrc/stable/library.h>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void pool(const Operands&... operands) const {
    COTNET_ON_TARGET((fusion_pool), operands..., parallel);
  }

  template <class... Operands>
  void blend(const Operands&... operands) const {
    COTNET_ON_TARGET((fusion_blend), operands..., parallel);
  }

  template <class... Operands>
  void sums(const Operands&... operands) const {
    COTNET_ON_TARGET((fusion_sums), operands..., parallel);
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    COTNET_ON_TARGET((fusion_backward), operands..., parallel);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("batch_norm_fusion_pool", TORCH_BOX(&host::batch_norm_fusion_pool<Cpu>));
  m.impl("batch_norm_fusion", TORCH_BOX(&host::batch_norm_fusion<Cpu>));
  m.impl("batch_norm_fusion_sums", TORCH_BOX(&host::batch_norm_fusion_sums<Cpu>));
  m.impl("batch_norm_fusion_backward", TORCH_BOX(&host::batch_norm_fusion_backward<Cpu>));
}
