// BatchNorm, with or without ReLU: the statistics of the batch, forward and backward. On CUDA.
#include "cuda/batch_norm.cuh"

#include "host/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include "cuda/batch_norm_statistics.cuh"
#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class scalar_t, class acc>
  void statistics(const MapProblem& p, const scalar_t* x, const acc* weight, const acc* bias, double eps, acc* norm, acc* factor,
                  acc* variance) const {
    const NormOutputs<acc> outputs{weight, bias, eps, norm, factor, variance};
    norm_statistics_launch(p, x, outputs, numbers, stream, CudaScratch<acc>(like));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class... Operands>
  void forward(const Operands&... operands) const {
    norm_forward_launch(operands..., numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t, class acc>
  void backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* x, const NormOf<acc>& norm, bool relu,
                scalar_t* grad_x, acc* grad_weight, acc* grad_bias) const {
    const CudaScratch<acc> scratch(like);
    const NormGradients<acc> to{scratch(5 * p.channels), grad_weight, grad_bias};
    norm_backward_launch(p, grad_y, x, norm, relu, grad_x, to, numbers, stream, scratch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("batch_norm_statistics", TORCH_BOX(&host::batch_norm_statistics<Cuda>));
  m.impl("batch_norm", TORCH_BOX(&host::batch_norm<Cuda>));
  m.impl("batch_norm_backward", TORCH_BOX(&host::batch_norm_backward<Cuda>));
}
