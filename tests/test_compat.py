"""The official names: what they compute, and what the originals get wrong."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import randn

from cotnet_ext import compat, modules, reference


def exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_same(function, expected, *tensors: torch.Tensor) -> None:
    """Equal results and equal gradients of every tensor."""
    results = []
    for f in (function, expected):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = f(*leaves)
        grads = torch.autograd.grad(y, leaves, randn(*y.shape, key="grad"))
        results.append((y.detach(), *grads))
    for ours, theirs in zip(*results, strict=True):
        exact(ours, theirs)


# --- signatures ----------------------------------------------------------------------------------

SIGNATURES = {
    "aggregation_zeropad": "input, weight, kernel_size=3, stride=1, padding=0, dilation=1",
    "aggregation_refpad": "input, weight, kernel_size=3, stride=1, padding=0, dilation=1",
    "aggregation_zeropad_dilate": "input, weight, dilation, kernel_size=3, stride=1",
    "aggregation_zeropad_mix": "input, weight1, weight2, kernel_size1=3, kernel_size2=5, "
    "stride=1, padding1=0, padding2=0, dilation=1",
    "aggregation_zeropad_mix_merge": "input, weight, head_num, w_channels, kernel_size1=3, "
    "kernel_size2=5, stride=1, padding1=0, padding2=0, dilation=1",
    "LocalConvolution": "in_channels, out_channels, kernel_size, stride=1, padding=0, "
    "dilation=1, pad_mode=0",
    "LocalConvolutionDilate": "in_channels, out_channels, kernel_size, stride=1",
    "LocalConvolutionMix": "in_channels, out_channels, kernel_size1, kernel_size2, stride=1, "
    "padding1=0, padding2=0, dilation=1, pad_mode=0",
    "LocalConvolutionMixMerge": "in_channels, out_channels, head_num, w_channels, kernel_size1, "
    "kernel_size2, stride=1, padding1=0, padding2=0, dilation=1, pad_mode=0",
    "CoTLayer": "dim, kernel_size",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_official_signature(name):
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    plain = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert ", ".join(plain) == SIGNATURES[name]


def test_every_name_is_exported():
    assert set(compat.__all__) == set(SIGNATURES)
    assert compat.CoTLayer is modules.CotLayer
    assert compat.LocalConvolution is modules.LocalConvolution


# --- one window ----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("name", "mode"), [("zeropad", "zeros"), ("refpad", "reflect")])
def test_one_window(name, mode, heads):
    x, weight = randn(2, 6, 9, 8), randn(2, heads, 3, 15, 5, 4)
    window = {"kernel_size": (3, 5), "stride": 2, "padding": (1, 2)}

    def ours(x, weight):
        return getattr(compat, f"aggregation_{name}")(x, weight, **window)

    def theirs(x, weight):
        return reference.local_aggregation(x, weight, **window, padding_mode=mode)

    assert_same(ours, theirs, x, weight)


@pytest.mark.parametrize("name", ["zeropad", "refpad"])
def test_weights_of_san(name):
    function = getattr(compat, f"aggregation_{name}")
    x, weight = randn(2, 8, 9, 7), randn(2, 4, 49, 5 * 4)
    window = {"kernel_size": 7, "stride": 2, "padding": 3}
    with_heads = weight.view(2, 1, 4, 49, 5, 4)
    assert torch.equal(function(x, weight, **window), function(x, with_heads, **window))


def test_weights_of_san_of_a_wrong_size():
    message = r"weight must be .*\[N, Cw, K, 20\], got \[2, 4, 9, 21\]"
    with pytest.raises(ValueError, match=message):
        compat.aggregation_zeropad(randn(2, 8, 5, 4), randn(2, 4, 9, 21), padding=1)


@pytest.mark.parametrize("name", ["zeropad", "refpad"])
def test_any_memory_layout(name):
    # The originals read channels_last memory as if it were contiguous.
    function = getattr(compat, f"aggregation_{name}")
    x, weight = randn(2, 8, 6, 5), randn(2, 1, 4, 9, 6, 5)
    expected = function(x, weight, padding=1)
    last = x.contiguous(memory_format=torch.channels_last)
    flat = weight.flatten(1, 3).contiguous(memory_format=torch.channels_last)
    exact(function(last, flat.unflatten(1, (1, 4, 9)), padding=1), expected)
    exact(function(x.mT.contiguous().mT, weight, padding=1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    # The originals cannot compile for the half types.
    x, weight = randn(2, 4, 5, 6, dtype=dtype), randn(2, 1, 2, 9, 5, 6, dtype=dtype)
    y = compat.aggregation_zeropad(x, weight, padding=1)
    assert y.dtype == dtype
    expected = reference.local_aggregation(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


# --- one dilation per weight channel -------------------------------------------------------------


def dilated(x, weight, dilations, kernel=3, stride=1):
    """`aggregation_zeropad_dilate` by one reference call per weight channel."""
    heads, cw = weight.shape[1:3]
    ys = []
    for m, d in enumerate(dilations):
        y = reference.local_aggregation(
            x[:, m::cw],
            weight[:, :, m : m + 1],
            kernel,
            stride,
            d * (kernel // 2),
            d,
        )
        ys.append(y.unflatten(1, (heads, -1)))
    return torch.stack(ys, 3).flatten(1, 3)


@pytest.mark.parametrize(
    "dilations", [[1, 1, 2, 4], [3, 1, 3, 2], [2, 2, 2, 2], [1, 9, 1, 1]], ids=str
)
def test_dilate(dilations):
    x, weight = randn(2, 8, 7, 6), randn(2, 2, 4, 9, 7, 6)
    dilation = torch.tensor(dilations)

    def ours(x, weight):
        return compat.aggregation_zeropad_dilate(x, weight, dilation)

    assert_same(ours, lambda x, weight: dilated(x, weight, dilations), x, weight)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float32])
def test_dilate_with_dilations_of_any_dtype(dtype):
    # The originals read the memory of the dilations as if it had the dtype of the input.
    x, weight = randn(1, 6, 5, 6), randn(1, 1, 3, 9, 5, 6)
    dilation = torch.tensor([1, 2, 3], dtype=dtype)
    y = compat.LocalConvolutionDilate(6, 6, 3)(x, weight, dilation)
    exact(y, dilated(x, weight, [1, 2, 3]))
    exact(compat.aggregation_zeropad_dilate(x, weight, [1, 2, 3]), y)


def test_dilate_honours_kernel_size_and_stride():
    x, weight = randn(2, 4, 9, 8), randn(2, 1, 2, 25, 5, 4)
    y = compat.LocalConvolutionDilate(4, 4, 5, 2)(x, weight, torch.tensor([1, 2]))
    exact(y, dilated(x, weight, [1, 2], kernel=5, stride=2))


def test_dilate_keeps_channels_last():
    x, weight = randn(2, 4, 5, 6), randn(2, 1, 2, 9, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    y = compat.aggregation_zeropad_dilate(last, weight, torch.tensor([1, 2]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact(y, dilated(x, weight, [1, 2]))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"dilation must be \[2\]", {"dilation": torch.tensor([1, 2, 3])}),
        (ValueError, r"dilation must be \[2\]", {"dilation": torch.tensor(1)}),
        (ValueError, "at least 1, got 0", {"dilation": torch.tensor([0, 1])}),
        (ValueError, "whole numbers", {"dilation": torch.tensor([1.5, 1.0])}),
        (TypeError, "whole numbers", {"dilation": torch.tensor([True, True])}),
        (TypeError, "whole numbers", {"dilation": [1, "2"]}),
        (TypeError, "dilation must be", {"dilation": 2}),
        (ValueError, "kernel_size must be odd", {"kernel_size": 2}),
        (ValueError, r"with Cw dividing 4", {"weight": randn(1, 1, 3, 9, 5, 5)}),
        (ValueError, r"weight must be \[N, G, Cw", {"weight": randn(1, 2, 9, 5)}),
        (ValueError, r"input must be \[N, C, H, W\]", {"input": randn(4, 5, 5)}),
        (TypeError, "input must be a Tensor", {"input": None}),
    ],
)
def test_dilate_errors(error, message, change):
    arguments = {
        "input": randn(1, 4, 5, 5),
        "weight": randn(1, 1, 2, 9, 5, 5),
        "dilation": torch.tensor([1, 2]),
    }
    with pytest.raises(error, match=message):
        compat.aggregation_zeropad_dilate(**(arguments | change))


# --- two windows ---------------------------------------------------------------------------------


def mixed(x, weight1, weight2, k1, k2, mode="zeros", stride=1):
    """`aggregation_zeropad_mix` by two reference calls."""
    ys = [
        reference.local_aggregation(x, w, k, stride, k // 2, padding_mode=mode)
        for w, k in ((weight1, k1), (weight2, k2))
    ]
    return torch.cat(ys, 1)


# The originals fail in both directions: with more than one head, and on maps of a width other
# than 17 for the merged weights.
MAPS = [(6, 6), (4, 17), (5, 20)]


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kernels", [(3, 5), (1, 3), (5, 7)], ids=str)
def test_mix_and_mix_merge(kernels, heads, size):
    k1, k2 = kernels
    x = randn(2, 8, *size)
    weight1 = randn(2, heads, 4, k1 * k1, *size, key=1)
    weight2 = randn(2, heads, 4, k2 * k2, *size, key=2)
    sizes = (k1, k2, 1, k1 // 2, k2 // 2)

    def expected(x, weight1, weight2):
        return mixed(x, weight1, weight2, k1, k2)

    def mix(x, weight1, weight2):
        return compat.aggregation_zeropad_mix(x, weight1, weight2, *sizes)

    def merged(x, weight1, weight2):
        weight = torch.cat([weight1.flatten(1, 3), weight2.flatten(1, 3)], 1)
        return compat.aggregation_zeropad_mix_merge(x, weight, heads, 4, *sizes)

    assert_same(mix, expected, x, weight1, weight2)
    assert_same(merged, expected, x, weight1, weight2)


def test_mix_gradient_of_one_weight_alone():
    # In the original the gradient of the second weight needs that of the first.
    x, weight1 = randn(1, 4, 6, 6), randn(1, 1, 2, 9, 6, 6)
    weight2 = randn(1, 1, 2, 25, 6, 6).requires_grad_()
    y = compat.aggregation_zeropad_mix(x, weight1, weight2, padding1=1, padding2=2)
    y.sum().backward()
    only = weight2.detach().requires_grad_()
    reference.local_aggregation(x, only, 5, padding=2).sum().backward()
    exact(weight2.grad, only.grad)


@pytest.mark.parametrize("mode", [0, 1])
def test_mixing_modules(mode):
    name = ("zeros", "reflect")[mode]
    x = randn(2, 8, 9, 6)
    weight1, weight2 = randn(2, 2, 4, 9, 5, 3), randn(2, 2, 4, 25, 5, 3)
    expected = mixed(x, weight1, weight2, 3, 5, name, stride=2)
    mix = compat.LocalConvolutionMix(8, 8, 3, 5, 2, 1, 2, pad_mode=mode)
    exact(mix(x, weight1, weight2), expected)
    merge = compat.LocalConvolutionMixMerge(8, 8, 2, 4, 3, 5, 2, 1, 2, pad_mode=mode)
    exact(merge(x, torch.cat([weight1.flatten(1, 3), weight2.flatten(1, 3)], 1)), expected)


def test_mix_errors():
    x, weight1, weight2 = randn(1, 4, 6, 6), randn(1, 1, 2, 9, 6, 6), randn(1, 1, 2, 25, 6, 6)
    mix = compat.aggregation_zeropad_mix
    with pytest.raises(ValueError, match=r"weight2 must have the map of weight1, \[6, 6\]"):
        mix(x, weight1, weight2[..., :4, :4], padding1=1, padding2=1)
    with pytest.raises(ValueError, match=r"weight2 must be \[N, G, Cw"):
        mix(x, weight1, weight2[0], padding1=1, padding2=2)
    with pytest.raises(TypeError, match="weight1 must be a Tensor, got NoneType"):
        mix(x, None, weight2)
    module = compat.LocalConvolutionMix(4, 4, 3, 5, padding1=1, padding2=2, pad_mode=2)
    with pytest.raises(ValueError, match="pad_mode must be 0"):
        module(x, weight1, weight2)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"weight must be \[N, 68, Ho, Wo\], got", {"weight": randn(1, 67, 6, 6)}),
        (TypeError, "weight must be a Tensor", {"weight": None}),
        (TypeError, "head_num must be an int", {"head_num": 1.0}),
        (ValueError, "w_channels must be at least 1", {"w_channels": 0}),
    ],
)
def test_mix_merge_errors(error, message, change):
    arguments = {
        "input": randn(1, 4, 6, 6),
        "weight": randn(1, 68, 6, 6),
        "head_num": 1,
        "w_channels": 2,
        "padding1": 1,
        "padding2": 2,
    }
    assert compat.aggregation_zeropad_mix_merge(**arguments).shape == (1, 8, 6, 6)
    with pytest.raises(error, match=message):
        compat.aggregation_zeropad_mix_merge(**(arguments | change))


# --- all of them ---------------------------------------------------------------------------------


def test_second_derivatives():
    # The originals drop second-order terms without a word.
    x = randn(1, 2, 3, 3).requires_grad_()
    weight1 = randn(1, 1, 2, 1, 3, 3).requires_grad_()
    weight2 = randn(1, 1, 2, 9, 3, 3).requires_grad_()

    def mix(*tensors):
        return compat.aggregation_zeropad_mix(*tensors, 1, 3, padding2=1)

    def dilate(x, weight):
        return compat.aggregation_zeropad_dilate(x, weight, [1, 2])

    for function, leaves in ((mix, (x, weight1, weight2)), (dilate, (x, weight2))):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_an_empty_batch():
    x = randn(0, 4, 6, 6)
    weight1, weight2 = randn(0, 1, 2, 9, 6, 6), randn(0, 1, 2, 25, 6, 6)
    assert compat.aggregation_zeropad(x, weight1, padding=1).shape == (0, 4, 6, 6)
    assert compat.aggregation_zeropad_dilate(x, weight1, [1, 2]).shape == (0, 4, 6, 6)
    y = compat.aggregation_zeropad_mix(x, weight1, weight2, padding1=1, padding2=2)
    assert y.shape == (0, 8, 6, 6)
