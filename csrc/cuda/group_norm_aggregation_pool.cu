// group_norm_aggregation with the SiLU and the pooling that follow it in a layer for evaluation. On CUDA.
#include "cuda/group_norm_aggregation_pool.cuh"

#include "host/group_norm_aggregation_pool.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class scalar_t, class acc>
  void pool(const AggregationProblem& p, const GroupNormOperands<scalar_t>& operands, double eps, const acc* shift,
            const scalar_t* k, scalar_t* y, acc* means) const {
    const NormParts parts = choose_group_norm_statistics(p, sizeof(scalar_t), numbers);
    const CudaScratch<double> scratch(like);
    group_norm_aggregation_pool(p, operands, eps, shift, k, y, means, parts, scratch(group_norm_forward_scratch(p, parts)),
                                numbers, stream, CudaScratch<acc>(like));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("group_norm_aggregation_pool", TORCH_BOX(&host::group_norm_aggregation_pool<Cuda>));
}
