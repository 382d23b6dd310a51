"""local_aggregation as a first CUDA version of it would be: one thread per result, nothing shared.

Compiled at run time with NVRTC through PyTorch. It takes contiguous tensors, one head, stride 1,
zero padding that keeps the size, and fewer than 2**31 elements.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Sums are in float. Loads and stores of 16-bit types are spelled out, so that no header is needed.
SCALARS = {
    torch.float32: """
typedef float scalar_t;
__device__ float load(const scalar_t* x, int at) { return x[at]; }
__device__ void store(scalar_t* y, int at, float value) { y[at] = value; }
""",
    torch.float16: """
typedef unsigned short scalar_t;
__device__ float load(const scalar_t* x, int at) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x[at]));
  return wide;
}
__device__ void store(scalar_t* y, int at, float value) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y[at]) : "f"(value));
}
""",
    torch.bfloat16: """
typedef unsigned short scalar_t;
__device__ float load(const scalar_t* x, int at) { return __uint_as_float((unsigned)x[at] << 16); }
__device__ void store(scalar_t* y, int at, float value) {
  unsigned bits = __float_as_uint(value);
  y[at] = (scalar_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
""",
}
KERNELS = """
// x, y [N, C, H, W]; w [N, Cw, k*k, H, W]. Every thread computes the element `at` of its result.

// One element of y: the sum over its window.
extern "C" __global__ void forward(const scalar_t* x, const scalar_t* w, scalar_t* y, int count,
                                   int C, int Cw, int H, int W, int k) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) return;
  int j = at % W, i = at / W % H, c = at / (W * H) % C, n = at / (W * H * C);
  float sum = 0;
  for (int u = 0; u < k; ++u)
    for (int v = 0; v < k; ++v) {
      int row = i + u - k / 2, column = j + v - k / 2;
      if (row < 0 || row >= H || column < 0 || column >= W) continue;
      sum += load(w, (((n * Cw + c % Cw) * k * k + u * k + v) * H + i) * W + j) *
             load(x, ((n * C + c) * H + row) * W + column);
    }
  store(y, at, sum);
}

// One element of the gradient of x: from all windows that it is in.
extern "C" __global__ void grad_input(const scalar_t* g, const scalar_t* w, scalar_t* dx,
                                      int count, int C, int Cw, int H, int W, int k) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) return;
  int j = at % W, i = at / W % H, c = at / (W * H) % C, n = at / (W * H * C);
  float sum = 0;
  for (int u = 0; u < k; ++u)
    for (int v = 0; v < k; ++v) {
      int row = i - u + k / 2, column = j - v + k / 2;
      if (row < 0 || row >= H || column < 0 || column >= W) continue;
      sum += load(w, (((n * Cw + c % Cw) * k * k + u * k + v) * H + row) * W + column) *
             load(g, ((n * C + c) * H + row) * W + column);
    }
  store(dx, at, sum);
}

// One element of the gradient of w: the sum over the channels that share it.
extern "C" __global__ void grad_weight(const scalar_t* g, const scalar_t* x, scalar_t* dw,
                                       int count, int C, int Cw, int H, int W, int k) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) return;
  int j = at % W, i = at / W % H, tap = at / (W * H) % (k * k);
  int m = at / (W * H * k * k) % Cw, n = at / (W * H * k * k * Cw);
  int row = i + tap / k - k / 2, column = j + tap % k - k / 2;
  float sum = 0;
  if (row >= 0 && row < H && column >= 0 && column < W)
    for (int c = m; c < C; c += Cw)
      sum += load(g, ((n * C + c) * H + i) * W + j) * load(x, ((n * C + c) * H + row) * W + column);
  store(dw, at, sum);
}
"""
THREADS = 256


def source(dtype: torch.dtype) -> str:
    return SCALARS[dtype] + KERNELS


@functools.cache
def _kernel(name: str, dtype: torch.dtype):
    return torch.cuda._compile_kernel(source(dtype), name)


def launch(name: str, first: Tensor, second: Tensor, result: Tensor, sizes: list[int]) -> Tensor:
    """The kernel over every element of `result`; sizes are C, Cw, H, W, k."""
    count = result.numel()
    blocks = (count + THREADS - 1) // THREADS
    arguments = [first, second, result, count, *sizes]
    _kernel(name, result.dtype)((blocks, 1, 1), (THREADS, 1, 1), arguments)
    return result


class _LocalAggregation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.sizes = [x.shape[1], w.shape[2], x.shape[2], x.shape[3], k]
        return launch("forward", x, w, torch.empty_like(x), ctx.sizes)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        dx = launch("grad_input", g, w, torch.empty_like(x), ctx.sizes)
        return dx, launch("grad_weight", g, x, torch.empty_like(w), ctx.sizes), None


def local_aggregation(input: Tensor, weight: Tensor, *, kernel_size: int, padding: int) -> Tensor:
    assert padding == kernel_size // 2 and weight.shape[1] == 1
    return _LocalAggregation.apply(input, weight, kernel_size)
