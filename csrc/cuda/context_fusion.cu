// context_fusion and its gradients on CUDA.
#include "cuda/context_fusion.cuh"

#include "host/context_fusion.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class scalar_t>
  void forward(const MapProblem& p, const scalar_t* d, const scalar_t* s, const scalar_t* logits, scalar_t* y) const {
    const auto plan = choose_context_fusion_forward(p, sizeof(scalar_t), are_aligned({d, s, y}), numbers);
    context_fusion_forward_launch(plan, d, s, logits, y, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t>
  void backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* d, const scalar_t* s, const scalar_t* logits,
                scalar_t* grad_d, scalar_t* grad_s, scalar_t* grad_logits) const {
    const bool aligned = are_aligned({grad_y, d, s, grad_d, grad_s});
    const auto plan = choose_context_fusion_backward(p, sizeof(scalar_t), aligned, numbers);
    const CudaScratch<acc_t<scalar_t>> scratch(like);
    acc_t<scalar_t>* const partial = scratch(grad_logits ? plan.partial_sums() : 0);
    context_fusion_backward_launch(plan, grad_y, d, s, logits, grad_d, grad_s, grad_logits, partial, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("context_fusion", TORCH_BOX(&host::context_fusion<Cuda>));
  m.impl("context_fusion_backward", TORCH_BOX(&host::context_fusion_backward<Cuda>));
}
