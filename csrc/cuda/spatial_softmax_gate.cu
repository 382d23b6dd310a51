// spatial_softmax_gate and its gradients on CUDA.
#include "cuda/spatial_softmax_gate.cuh"

#include "host/spatial_softmax_gate.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class scalar_t>
  void forward(const MapProblem& p, const scalar_t* x, const scalar_t* v, const scalar_t* s, scalar_t* y) const {
    const auto plan = choose_spatial_softmax_gate_forward(p, sizeof(scalar_t), are_aligned({x, v, s, y}), numbers);
    const CudaScratch<acc_t<scalar_t>> scratch(like);
    spatial_softmax_gate_forward_launch(plan, x, v, s, y, scratch(plan.partial_sums()), stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t>
  void backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* x, const scalar_t* v, scalar_t* grad_x,
                scalar_t* grad_v) const {
    if (!grad_x && !grad_v) return;
    const auto choose = grad_x ? choose_spatial_softmax_gate_backward : choose_spatial_softmax_gate_forward;
    const auto plan = choose(p, sizeof(scalar_t), are_aligned({grad_y, x, v, grad_x, grad_v}), numbers);
    const CudaScratch<acc_t<scalar_t>> scratch(like);
    spatial_softmax_gate_backward_launch(plan, grad_y, x, v, grad_x, grad_v, scratch(plan.partial_sums()), stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("spatial_softmax_gate", TORCH_BOX(&host::spatial_softmax_gate<Cuda>));
  m.impl("spatial_softmax_gate_backward", TORCH_BOX(&host::spatial_softmax_gate_backward<Cuda>));
}
