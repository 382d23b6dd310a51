"""Argument checks, output shapes and memory formats: one place for the functions, the fake kernels
and their messages.

Wrong types and dtypes raise ``TypeError``; wrong shapes, sizes, devices and modes raise
``ValueError``. Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
PADDING_MODES = ("zeros", "reflect")
_LARGEST = 2**31 - 1  # of a window argument: keeps every product of two of them within 64 bits

# (kernel_size, stride, padding, dilation, padding_mode), the first four as pairs (rows, columns).
Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], str]


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """``value`` as (rows, columns), each at least ``least``."""
    if type(value) is int:
        both = (value, value)
    else:
        both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        if not all(_is_int(size) for size in both):
            raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
        if len(both) != 2:
            raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if not (least <= both[0] <= _LARGEST and least <= both[1] <= _LARGEST):
        raise ValueError(f"{name} must be from {least} to {_LARGEST}, got {value!r}")
    return both


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def window(
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    padding_mode: str,
) -> Window:
    """The arguments that every aggregation shares, normalised to pairs."""
    if padding_mode not in PADDING_MODES:
        if not isinstance(padding_mode, str):
            raise TypeError(f"padding_mode must be a str, got {padding_mode!r}")
        raise ValueError(f'padding_mode must be "zeros" or "reflect", got "{padding_mode}"')
    return (
        pair("kernel_size", kernel_size, 1),
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        padding_mode,
    )


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions of a window along one axis, as ``torch.nn.functional.unfold`` counts them."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def alike(optional: dict[str, Tensor | None] | None = None, /, **tensors: Tensor) -> None:
    """All tensors are dense and floating, of one dtype and on one device that this build has
    kernels for."""
    if optional:
        tensors.update((name, tensor) for name, tensor in optional.items() if tensor is not None)
    first_name = first = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if first is None:
            if tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
                )
            first_name, first = name, tensor
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} like {first_name}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on {first.device} like {first_name}, got {tensor.device}"
            )
    if first.device.type != "cpu":
        device(first_name, first)


def device(name: str, tensor: Tensor) -> None:
    """The tensor's device has kernels in this build."""
    kind = tensor.device.type
    if kind == "cuda" and not _built_with_cuda():
        raise ValueError(
            f"{name} is on {tensor.device}, but this build of cotnet_ext has CPU kernels only: "
            "reinstall it with CUDA, `COTNET_EXT_CUDA=1 pip install --no-build-isolation .`, "
            "where torch is a CUDA build and nvcc is on PATH"
        )
    if kind not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on a cpu or cuda device, got {tensor.device}")


def _built_with_cuda() -> bool:
    return "cuda_version=\n" not in torch.ops.cotnet_ext.build_info()


def aggregation(
    input: Tensor,
    weight: Tensor,
    window: Window,
    weight_name: str = "weight",
    optional: dict[str, Tensor | None] | None = None,
) -> tuple[int, int, int, int]:
    """Checks input [N, C, H, W] against weight [N, G, Cw, K, Ho, Wo]; returns the output's shape
    [N, G*C, Ho, Wo]."""
    alike(optional, input=input, **{weight_name: weight})
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got {_shape(input)}")
    if weight.dim() != 6:
        raise ValueError(f"{weight_name} must be [N, G, Cw, K, Ho, Wo], got {_shape(weight)}")
    n, c, _, _ = input.shape
    if c == 0:
        raise ValueError(f"input must have at least one channel, got {_shape(input)}")
    ho, wo = _output_map(input, window)
    (kh, kw), *_ = window
    wn, g, cw, k, wh, ww = weight.shape
    if wn != n or k != kh * kw or wh != ho or ww != wo or g < 1 or cw < 1 or c % cw != 0:
        raise ValueError(
            f"{weight_name} must be [{n}, G, Cw, {kh * kw}, {ho}, {wo}] with Cw dividing {c}, "
            f"got {_shape(weight)}"
        )
    return n, g * c, ho, wo


def _output_map(input: Tensor, window: Window) -> tuple[int, int]:
    kernel, stride, padding, dilation, mode = window
    h, w = input.shape[2], input.shape[3]
    ho = output_size(h, kernel[0], stride[0], padding[0], dilation[0])
    wo = output_size(w, kernel[1], stride[1], padding[1], dilation[1])
    if ho < 1 or wo < 1:
        raise ValueError(
            f"kernel_size {kernel} with dilation {dilation} must fit into input of {h}x{w} "
            f"with padding {padding}, got an output of {max(ho, 0)}x{max(wo, 0)}"
        )
    if mode == "reflect" and (padding[0] >= h or padding[1] >= w):
        raise ValueError(
            'padding must be smaller than the map with padding_mode="reflect", '
            f"got {padding} for input of {h}x{w}"
        )
    return ho, wo


def norm_parameters(weight: Tensor, parameters: dict[str, Tensor | None]) -> None:
    """Affine parameters of the group norm: one value per head, weight channel and tap."""
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    for name, parameter in parameters.items():
        if parameter is not None and (parameter.dim() != 1 or parameter.shape[0] != size):
            raise ValueError(f"{name} must be [{size}], got {_shape(parameter)}")


def number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")


def maps(**tensors: Tensor) -> None:
    """Maps [N, C, H, W] of one shape."""
    alike(**tensors)
    first_name, first = next(iter(tensors.items()))
    if first.dim() != 4:
        raise ValueError(f"{first_name} must be [N, C, H, W], got {_shape(first)}")
    for name, tensor in tensors.items():
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must be {_shape(first)} like {first_name}, got {_shape(tensor)}"
            )


def fusion_logits(dynamic: Tensor, logits: Tensor) -> None:
    n, c = dynamic.shape[0], dynamic.shape[1]
    if logits.dim() != 3 or logits.shape[0] != n or logits.shape[1] != c or logits.shape[2] != 2:
        raise ValueError(f"logits must be [{n}, {c}, 2], got {_shape(logits)}")


def _is_dense(tensor: Tensor, order: tuple[int, ...]) -> bool:
    """Without holes, dimensions nested in this order, the innermost first."""
    expected = 1
    for dim in order:
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return tensor.numel() == 0
        expected *= tensor.shape[dim]
    return True


def tap_major(weight: Tensor) -> bool:
    """Whether a weight [N, 1, Cw, K, Ho, Wo] is [N, Ho, Wo, K, Cw] in memory: with channels_last
    maps, the CUDA kernels take that as it is, and the gradient is laid out so too
    (host/checks.cpp agrees)."""
    return (
        weight.shape[1] == 1
        and not _is_dense(weight, (3, 2, 1, 5, 4, 0))
        and _is_dense(weight, (2, 3, 1, 5, 4, 0))
    )


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for maps strided that way, else contiguous: the format of every result
    (host/checks.cpp agrees)."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[dim] * sizes[dim] if sizes[dim] > 1 else strides[dim]
    return torch.channels_last
