// The end of a contextual layer in one pass each way: norm, SiLU, pooling and fusion of both contexts. On CUDA.
#include "cuda/batch_norm_fusion.cuh"

#include "host/batch_norm_fusion.h"

#include <torch/csrc/stable/library.h>

#include "host/cuda_context.h"
#include "host/cuda_scratch.h"

namespace cotnet {
namespace {

struct Cuda : CudaContext {
  using CudaContext::CudaContext;

  template <class scalar_t, class acc>
  void pool(const MapProblem& p, const scalar_t* y0, const scalar_t* k0, const acc* norm, const acc* static_norm,
            acc* means) const {
    fusion_pool_launch(p, y0, k0, norm, static_norm, means, numbers, stream, CudaScratch<acc>(like));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class... Operands>
  void blend(const Operands&... operands) const {
    fusion_blend_launch(operands..., numbers, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t, class acc>
  void sums(const MapProblem& p, const scalar_t* grad_y, const scalar_t* y0, const scalar_t* k0, const acc* norm,
            const acc* static_norm, acc* sums) const {
    fusion_sums_launch(p, grad_y, y0, k0, norm, static_norm, sums, numbers, stream, CudaScratch<acc>(like));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class scalar_t, class acc>
  void backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* y0, const NormOf<acc>& norm, const acc* attention,
                const acc* pooled, const acc* sums, scalar_t* grad_dynamic, scalar_t* grad_static, acc* grad_weight,
                acc* grad_bias) const {
    const CudaScratch<acc> scratch(like);
    const NormGradients<acc> to{scratch(5 * p.channels), grad_weight, grad_bias};
    fusion_backward_launch(p, grad_y, y0, norm, FusionTerms<acc>{attention, pooled, sums}, grad_dynamic, grad_static, to, numbers,
                           stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace cotnet

STABLE_TORCH_LIBRARY_IMPL(cotnet_ext, CUDA, m) {
  using namespace cotnet;
  m.impl("batch_norm_fusion_pool", TORCH_BOX(&host::batch_norm_fusion_pool<Cuda>));
  m.impl("batch_norm_fusion", TORCH_BOX(&host::batch_norm_fusion<Cuda>));
  m.impl("batch_norm_fusion_sums", TORCH_BOX(&host::batch_norm_fusion_sums<Cuda>));
  m.impl("batch_norm_fusion_backward", TORCH_BOX(&host::batch_norm_fusion_backward<Cuda>));
}
