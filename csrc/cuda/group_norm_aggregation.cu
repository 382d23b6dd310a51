// group_norm_aggregation and its backward on CUDA.
#include "cuda/group_norm_aggregation.cuh"

#include "host/group_norm_aggregation.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class scalar_t>
  void forward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& operands, double eps, scalar_t* y) const {
    const NormParts parts = choose_group_norm_statistics(p, sizeof(scalar_t), numbers);
    const CudaScratch<double> scratch(like);
    group_norm_aggregation_forward(p, operands, eps, y, parts, scratch(group_norm_forward_scratch(p, parts)), numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t, class... Gradients>
  void backward(const AggregationProblem& p, const GroupNormOperands<scalar_t>& operands, const scalar_t* grad_y,
                Gradients... gradients) const {
    const CudaScratch<double> scratch(like);
    double* const sums = scratch(group_norm_backward_scratch(p, sizeof(scalar_t), numbers));
    group_norm_aggregation_backward(p, operands, grad_y, gradients..., sums, numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("group_norm_aggregation", TORCH_BOX(&host::group_norm_aggregation<Cuda>));
  m.impl("group_norm_aggregation_backward", TORCH_BOX(&host::group_norm_aggregation_backward<Cuda>));
}
