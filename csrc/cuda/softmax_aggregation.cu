// softmax_aggregation and its backward on CUDA.
#include "cuda/softmax_aggregation.cuh"

#include "host/softmax_aggregation.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    softmax_aggregation_forward(operands..., numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t>
  void backward(const AggregationProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* logits, scalar_t* grad_x,
                scalar_t* grad_logits) const {
    const CudaScratch<acc_t<scalar_t>> scratch(like);
    softmax_aggregation_backward(p, grad_y, x, logits, grad_x, grad_logits, scratch(softmax_scratch(p)), numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("softmax_aggregation", TORCH_BOX(&host::softmax_aggregation<Cuda>));
  m.impl("softmax_aggregation_backward", TORCH_BOX(&host::softmax_aggregation_backward<Cuda>));
}
