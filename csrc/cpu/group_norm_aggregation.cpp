// group_norm_aggregation and its backward on the CPU.
#define COTNET_LOOPS "cpu/group_norm_aggregation.h"
#include "cpu/foreach_target.h"

#include "host/group_norm_aggregation.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "host/cpu_context.h"

namespace cotnet {
namespace {

// Sums [N, size] over N in a fixed order into a vector of the parameters' dtype.
template <class scalar_t>
void sum_images(const std::vector<acc_t<scalar_t>>& rows, int64_t batch, scalar_t* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t n = 0; n < batch; ++n) sum += double(rows[size_t(n * size + i)]);
    out[i] = narrow<scalar_t>(acc_t<scalar_t>(sum));
  }
}

struct Cpu : CpuContext {
  using CpuContext::CpuContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    COTNET_ON_TARGET((group_norm_aggregation_forward), operands..., parallel);
  }

  template <class scalar_t>
  void backward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& operands, const scalar_t* grad_y,
                scalar_t* grad_x, scalar_t* grad_w, scalar_t* grad_gamma, scalar_t* grad_beta) const {
    const int64_t parameters = p.heads * p.weight_channels * p.taps();
    std::vector<acc_t<scalar_t>> gammas(grad_gamma ? size_t(p.batch * parameters) : 0);
    std::vector<acc_t<scalar_t>> betas(grad_beta ? size_t(p.batch * parameters) : 0);
    COTNET_ON_TARGET((group_norm_aggregation_backward), p, operands, grad_y, grad_x, grad_w,
                     grad_gamma ? gammas.data() : nullptr, grad_beta ? betas.data() : nullptr, parallel);
    if (grad_gamma) sum_images(gammas, p.batch, grad_gamma, parameters);
    if (grad_beta) sum_images(betas, p.batch, grad_beta, parameters);
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CPU, m) {
  using namespace cotnet;
  m.impl("group_norm_aggregation", TORCH_BOX(&host::group_norm_aggregation<Cpu>));
  m.impl("group_norm_aggregation_backward", TORCH_BOX(&host::group_norm_aggregation_backward<Cpu>));
}
