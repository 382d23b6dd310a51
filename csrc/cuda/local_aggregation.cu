// local_aggregation and its gradients on CUDA.
#include "cuda/local_aggregation.cuh"

#include "host/local_aggregation.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class... Operands>
  void forward(const Operands&... operands) const {
    local_aggregation_forward(operands..., numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class... Operands>
  void backward(const Operands&... operands) const {
    local_aggregation_backward(operands..., numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("local_aggregation", TORCH_BOX(&host::local_aggregation<Cuda>));
  m.impl("local_aggregation_grad_input", TORCH_BOX(&host::local_aggregation_grad_input<Cuda>));
  m.impl("local_aggregation_grad_weight", TORCH_BOX(&host::local_aggregation_grad_weight<Cuda>));
  m.impl("local_aggregation_backward", TORCH_BOX(&host::local_aggregation_backward<Cuda>));
}
