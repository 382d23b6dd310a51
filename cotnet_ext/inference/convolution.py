"""One convolution with all that stood behind it: norm, sum with another map, activation.

The norm is in the weights. The rest goes into the convolution where the backend takes it: on the
CPU these are the primitives of oneDNN that `torch.compile` uses too, with weights in the order that
oneDNN wants for the map at hand. What compiles, exports, traces or differentiates sees
`F.conv2d` and what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

# What oneDNN calls the activations that it computes on its way out of a convolution.
ACTIVATIONS = {None: "none", "relu": "relu", "silu": "swish"}


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The factor and the summand of each channel that `norm` is in evaluation, in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def fold(
    weight: Tensor, bias: Tensor | None, norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution or linear layer that does what `norm` did after it."""
    if norm is None:
        return weight, bias
    scale, shift = scale_and_shift(norm)
    if bias is not None:
        shift = shift + bias.double() * scale
    rows = scale.view(-1, *(1,) * (weight.dim() - 1))
    return (weight.double() * rows).to(weight.dtype), shift.to(weight.dtype)


class FusedConv2d(nn.Conv2d):
    """`activation(conv(input) + other)` with the weights of `conv`; a Conv2d for evaluation only.

    Args:
        conv: a Conv2d that pads with zeros, whose geometry is taken over.
        weight, bias: what stands in place of its own, see `fold`.
        activation: None, `"relu"` or `"silu"`.
        memory_format: of the maps inside. Only channels_last runs on packed weights.

    `forward(input, other=None, overwrite=False)`: `other` has the shape of the result, and is where
    the result may be written if it is to be overwritten.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__(
            weight.shape[1] * conv.groups,
            weight.shape[0],
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias is not None,
            device="meta",  # draws no random numbers for weights that are there already
        )
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.activation = activation
        self.channels_last = memory_format == torch.channels_last
        # The weight in the order of oneDNN, and the size, data and version that it was made for.
        self._packed: tuple[tuple, Tensor] | None = None

    def forward(
        self, input: Tensor, other: Tensor | None = None, overwrite: bool = False
    ) -> Tensor:
        if input.dtype != self.weight.dtype and not _autocast_enabled(input):
            input = input.to(self.weight.dtype)
        if (
            self.channels_last
            and _is_packable(input, self.weight)
            and (other is None or self._takes(other, input))
        ):
            return self._run_packed(input, other, overwrite)
        result = F.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        if other is not None:
            result = result + other
        if self.activation == "relu":
            return F.relu(result, inplace=not result.requires_grad)
        if self.activation == "silu":
            return F.silu(result, inplace=not result.requires_grad)
        return result

    def _takes(self, other: Tensor, input: Tensor) -> bool:
        """Whether the sum with `other` may be part of the convolution."""
        if self.activation == "silu" or other.dtype != input.dtype:
            return False
        sizes = zip(
            input.shape[2:],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        result = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
        return list(other.shape) == [input.shape[0], self.out_channels, *result]

    def _run_packed(self, input: Tensor, other: Tensor | None, overwrite: bool) -> Tensor:
        ops = torch.ops.mkldnn
        layout = torch.channels_last
        stride = self.stride
        if self.kernel_size == (1, 1) and stride != (1, 1) and self.padding == (0, 0):
            # Wide maps pass the caches twice as fast when they are thinned out beforehand.
            input, stride = input[:, :, :: stride[0], :: stride[1]], (1, 1)
        input = input.contiguous(memory_format=layout)
        geometry = (self.padding, stride, self.dilation, self.groups)
        weight = self._packed_weight(input, geometry)
        how = ACTIVATIONS[self.activation]
        if other is None:
            return ops._convolution_pointwise(input, weight, self.bias, *geometry, how, [], "")
        other = other.contiguous(memory_format=layout)
        last = ("add", 1.0, None if how == "none" else how, [], "")
        if overwrite:
            return ops._convolution_pointwise_.binary(
                other, input, weight, self.bias, *geometry, *last
            )
        return ops._convolution_pointwise.binary(input, other, weight, self.bias, *geometry, *last)

    def _packed_weight(self, input: Tensor, geometry: tuple) -> Tensor:
        """The weight as oneDNN wants it for maps of this size: another order may be 20x slower."""
        weight, packed = self.weight, self._packed
        version = 0 if weight.is_inference() else weight._version
        key = (input.shape, weight.data_ptr(), version)
        if packed is None or packed[0] != key:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            packed = key, reorder(weight.detach(), *geometry, list(input.shape))
            self._packed = packed  # in one piece: other threads see the old one or the new one
        return packed[1]

    def __getstate__(self) -> dict:
        # Copies and files hold the weight once; it is packed again when it is needed.
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FusedLinear(nn.Module):
    """A Linear and the BatchNorm1d after it: one product for `[N, features]`.

    On inputs with more dimensions the norm works on another one than the last, so both are called.
    """

    def __init__(self, linear: nn.Linear, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm
        weight, bias = fold(linear.weight, linear.bias, norm)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            return self.norm(self.linear(input))
        return F.linear(input, self.weight, self.bias)


def _autocast_enabled(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def _is_packable(input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may be called directly: plain tensors, and nobody who watches or transforms.

    The calls have no derivatives, cannot be traced, and take packed weights that are no
    ordinary tensors.
    """
    return (
        input.device.type == "cpu"
        and type(input) is Tensor
        and input.dtype == weight.dtype
        and input.dim() == 4
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not (torch.is_grad_enabled() and input.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and _has_fast_convolutions(input.dtype)
        and input.numel() > 0
    )


def _has_fast_convolutions(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN's fused convolutions for a dtype on this processor."""
    return torch._C._get_mkldnn_enabled() and _supports(dtype)


_SUPPORT: dict[torch.dtype, bool] = {}


def _supports(dtype: torch.dtype) -> bool:
    if dtype not in _SUPPORT:
        _SUPPORT[dtype] = _find_support(dtype)
    return _SUPPORT[dtype]


def _find_support(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_convolution_pointwise"):
        return False
    if ops._is_mkldnn_acl_supported():
        return False  # on ARM: not measured
    if dtype == torch.bfloat16:
        return ops._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return ops._is_mkldnn_fp16_supported()
    return dtype == torch.float32
