"""The specification itself: against loops, against PyTorch's own layers, against cases by hand.

Everything else is compared with `cotnet_ext.reference`; nothing here uses the rest of the package.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cases import CASES, EMPTY, TINY, Case, dtype_id, each, pair, randn
from tolerances import exact
from torch.nn import functional as F

from cotnet_ext import reference

# Small enough for a Python loop over pixels, and every option of the window among them.
LOOPED = tuple(
    CASES[name]
    for name in (
        "odd_9x11",
        "map_1x1_k5",
        "k2_grows",
        "k4_even",
        "k3x5",
        "stride2x1",
        "stride4_skips_pixels",
        "dilation1x3",
        "dilation8_rows_outside",
        "padding3_windows_outside",
        "heads3",
        "cw_equals_c",
        "cw_is_1",
        "reflect",
        "reflect_to_the_edge",
        "reflect_stride2_dilation2",
        "reflect_heads2_k4",
    )
)
DIFFERENTIATED = ("tiny_k3", "tiny_k2_stride2x1", "tiny_reflect")


def reflected(index: int, size: int) -> int:
    """The pixel that a reflecting edge shows at a position outside of the map."""
    return -index if index < 0 else 2 * (size - 1) - index if index >= size else index


def looped_aggregation(x: torch.Tensor, weight: torch.Tensor, case: Case) -> torch.Tensor:
    """The formula of `local_aggregation`, one pixel, tap and head at a time."""
    n, c, h, w = x.shape
    shared = [channel % weight.shape[2] for channel in range(c)]
    heads, (ho, wo) = weight.shape[1], weight.shape[4:]
    (kh, kw), (sh, sw) = pair(case.kernel_size), pair(case.stride)
    (ph, pw), (dh, dw) = pair(case.padding), pair(case.dilation)
    y = torch.zeros(n, heads * c, ho, wo, dtype=x.dtype)
    for i, j, u, v in itertools.product(range(ho), range(wo), range(kh), range(kw)):
        row, column = i * sh - ph + u * dh, j * sw - pw + v * dw
        if case.padding_mode == "reflect":
            row, column = reflected(row, h), reflected(column, w)
        if not (0 <= row < h and 0 <= column < w):
            continue
        for g in range(heads):
            own = weight[:, g, shared, u * kw + v, i, j]
            y[:, g * c : (g + 1) * c, i, j] += own * x[:, :, row, column]
    return y


def windowed(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """An input and a weight of one case, in float64."""
    return (
        randn(*case.input_shape, key=(case.name, "x")),
        randn(*case.weight_shape, key=(case.name, "w")),
    )


# --- local_aggregation ---------------------------------------------------------------------------


@each(LOOPED + TINY)
def test_local_aggregation_is_the_formula(case):
    x, weight = windowed(case)
    y = reference.local_aggregation(x, weight, **case.geometry)
    assert y.shape == case.output_shape
    exact(y, looped_aggregation(x, weight, case))


def test_channels_share_weights_interleaved():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    weight = torch.tensor([10.0, 100.0]).view(1, 1, 2, 1, 1, 1)
    y = reference.local_aggregation(x, weight, kernel_size=1)
    assert y.flatten().tolist() == [10.0, 200.0, 30.0, 400.0]


def test_heads_are_outermost():
    x = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    weight = torch.tensor([10.0, 100.0]).view(1, 2, 1, 1, 1, 1)
    y = reference.local_aggregation(x, weight, kernel_size=1)
    assert y.flatten().tolist() == [10.0, 20.0, 100.0, 200.0]


def test_taps_are_row_major_and_not_flipped():
    # The only tap with weight 1 is row 0, column 2: each pixel shows the one above to its right.
    x = torch.arange(12.0).view(1, 1, 3, 4)
    weight = torch.zeros(1, 1, 1, 9, 3, 4)
    weight[:, :, :, 2] = 1
    y = reference.local_aggregation(x, weight, kernel_size=3, padding=1)
    assert y.flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 5, 6, 7, 0]


@pytest.mark.parametrize("weight_channels", [1, 2, 6])
@each(
    CASES[name]
    for name in ("k3x5", "k4_even", "stride2x1", "dilation2_stride2", "reflect_stride2_dilation2")
)
def test_constant_weights_are_a_depthwise_convolution(case, weight_channels):
    kernel, channels = pair(case.kernel_size), 6
    x = randn(2, channels, case.height, case.width)
    taps = randn(weight_channels, 1, *kernel)
    weight = taps.reshape(1, 1, weight_channels, -1, 1, 1)
    weight = weight.expand(2, -1, -1, -1, *case.output_size)
    ph, pw = pair(case.padding)
    mode = "reflect" if case.padding_mode == "reflect" else "constant"
    convolved = F.conv2d(
        F.pad(x, (pw, pw, ph, ph), mode),
        taps.repeat(channels // weight_channels, 1, 1, 1),
        stride=case.stride,
        dilation=case.dilation,
        groups=channels,
    )
    exact(reference.local_aggregation(x, weight, **case.geometry), convolved)


def test_unknown_padding_mode():
    with pytest.raises(ValueError, match="padding_mode must be 'zeros' or 'reflect', got 'edge'"):
        reference.local_aggregation(
            torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1, 1), 1, padding_mode="edge"
        )


# --- the fused functions -------------------------------------------------------------------------


@each(LOOPED)
def test_softmax_aggregation_is_the_formula(case):
    x, logits = windowed(case)
    weight = logits.exp() / logits.exp().sum(3, keepdim=True)
    y = reference.softmax_aggregation(x, logits, **case.geometry)
    exact(y, looped_aggregation(x, weight, case))


def test_softmax_of_equal_logits_is_the_average():
    x = randn(2, 6, 7, 8)
    logits = torch.zeros(2, 1, 3, 9, 7, 8, dtype=x.dtype)
    y = reference.softmax_aggregation(x, logits, kernel_size=3, padding=1)
    exact(y, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=True))


def test_minus_infinity_is_weight_zero():
    x = randn(1, 2, 4, 5)
    logits = torch.full((1, 1, 1, 9, 4, 5), -torch.inf, dtype=x.dtype)
    logits[:, :, :, 4] = 0
    assert torch.equal(reference.softmax_aggregation(x, logits, padding=1), x)


@each(LOOPED)
def test_group_norm_aggregation_is_the_formula(case):
    x, weight = windowed(case)
    gamma, beta = randn(case.norm_size, key="gamma"), randn(case.norm_size, key="beta")
    mean = weight.mean((3, 4, 5), keepdim=True)
    variance = weight.var((3, 4, 5), unbiased=False, keepdim=True)
    affine = (1, case.heads, case.weight_channels, case.taps, 1, 1)
    normal = (weight - mean) / (variance + 1e-5).sqrt()
    expected = looped_aggregation(x, normal * gamma.view(affine) + beta.view(affine), case)
    exact(reference.group_norm_aggregation(x, weight, gamma, beta, **case.geometry), expected)
    expected = looped_aggregation(x, normal, case)
    exact(reference.group_norm_aggregation(x, weight, **case.geometry), expected)


def test_group_norm_eps():
    x, weight = windowed(CASES["odd_9x11"])
    weight = weight * 1e-3
    y = reference.group_norm_aggregation(x, weight, eps=0.5, padding=1)
    variance = weight.var((3, 4, 5), unbiased=False, keepdim=True)
    normal = (weight - weight.mean((3, 4, 5), keepdim=True)) / (variance + 0.5).sqrt()
    exact(y, looped_aggregation(x, normal, CASES["odd_9x11"]))


def test_spatial_softmax_gate_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, torch.inf]]).nan_to_num(posinf=1e4).view(1, 1, 2, 2)
    value, static = torch.full((1, 1, 2, 2), 3.0), torch.arange(4.0).view(1, 1, 2, 2)
    y = reference.spatial_softmax_gate(logits, value, static)
    assert y.flatten().tolist() == [0.0, 1.0, 2.0, 6.0]
    y = reference.spatial_softmax_gate(torch.zeros_like(value), value, static)
    assert y.flatten().tolist() == [0.75, 1.75, 2.75, 3.75]


def test_spatial_softmax_gate_is_the_formula():
    logits, value, static = (randn(2, 3, 4, 5, key=name) for name in ("logits", "value", "static"))
    y = torch.empty_like(value)
    for n, c in itertools.product(range(2), range(3)):
        p = logits[n, c].exp() / logits[n, c].exp().sum()
        y[n, c] = static[n, c] + p * value[n, c]
    exact(reference.spatial_softmax_gate(logits, value, static), y)


def test_context_fusion_is_the_formula():
    dynamic, static = randn(2, 3, 4, 5, key="dynamic"), randn(2, 3, 4, 5, key="static")
    logits = randn(2, 3, 2, key="logits")
    y = torch.empty_like(dynamic)
    for n, c in itertools.product(range(2), range(3)):
        p = torch.sigmoid(logits[n, c, 0] - logits[n, c, 1])
        y[n, c] = p * dynamic[n, c] + (1 - p) * static[n, c]
    exact(reference.context_fusion(dynamic, static, logits), y)


# --- what holds for all of them ------------------------------------------------------------------

Arguments = tuple[torch.Tensor, ...]


def _calls(case: Case) -> dict[str, tuple[functools.partial, Arguments]]:
    """Every function with arguments on one case: name -> (function of tensors, tensors)."""
    x, weight = windowed(case)
    maps = [randn(*case.input_shape, key=key) for key in ("a", "b", "c")]
    logits = randn(case.batch, case.channels, 2, key="logits")
    affine = [randn(case.norm_size, key=key) for key in ("gamma", "beta")]
    windows = {
        "local_aggregation": (x, weight),
        "softmax_aggregation": (x, weight),
        "group_norm_aggregation": (x, weight, *affine),
    }
    maps_only = {"spatial_softmax_gate": tuple(maps), "context_fusion": (*maps[:2], logits)}
    calls = {
        name: (functools.partial(getattr(reference, name), **case.geometry), tensors)
        for name, tensors in windows.items()
    }
    return calls | {name: (getattr(reference, name), t) for name, t in maps_only.items()}


FUNCTIONS = tuple(_calls(CASES["tiny_k3"]))
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@every_function
@each(CASES[name] for name in DIFFERENTIATED)
def test_derivatives(name, case):
    function, tensors = _calls(case)[name]
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_derivatives_of_channels_last_weights():
    case = CASES["tiny_k3"]
    function, (x, weight, gamma, beta) = _calls(case)["group_norm_aggregation"]
    flat = weight.flatten(1, 3).contiguous(memory_format=torch.channels_last)
    last = flat.unflatten(1, weight.shape[1:4])
    for tensors in ((x, last, gamma, beta), (x, last)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    y = function(x, last.detach().requires_grad_(), norm_bias=beta.requires_grad_())
    assert torch.autograd.grad(y.sum(), beta)[0].shape == beta.shape


@every_function
def test_vmap_is_a_loop(name):
    function, tensors = _calls(CASES["odd_9x11"])[name]
    several = [torch.stack([t, 2 * t, -t]) for t in tensors]
    looped = torch.stack([function(*parts) for parts in zip(*several, strict=True)])
    exact(torch.func.vmap(function)(*several), looped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@every_function
def test_narrow_dtypes(name, dtype):
    function, tensors = _calls(CASES["reflect"])[name]
    narrow = [t.to(dtype) for t in tensors]
    expected = function(*(t.double() for t in narrow))
    result = function(*narrow)
    assert result.dtype == dtype
    # A handful of roundings of the dtype.
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


@every_function
def test_autocast_casts_every_floating_argument(name):
    function, tensors = _calls(CASES["odd_9x11"])[name]
    mixed = [t.bfloat16() if i % 2 else t.float() for i, t in enumerate(tensors)]
    expected = function(*(t.bfloat16() for t in mixed))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(*mixed), expected)
        assert function(*tensors).dtype == torch.float64


@every_function
@each(EMPTY)
def test_empty_batch(name, case):
    function, tensors = _calls(case)[name]
    leaves = [t.requires_grad_() for t in tensors]
    y = function(*leaves)
    assert y.shape[0] == 0 and y.dim() == 4
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_keyword_arguments():
    case = CASES["odd_9x11"]
    x, weight = windowed(case)
    by_name = reference.local_aggregation(input=x, weight=weight, **case.geometry)
    assert torch.equal(by_name, reference.local_aggregation(x, weight, 3, 1, 1, 1))


def test_local_convolution_pad_modes():
    x, weight = windowed(CASES["reflect"])
    for mode, name in enumerate(("zeros", "reflect")):
        layer = reference.LocalConvolution(16, 16, 3, padding=1, pad_mode=mode)
        expected = reference.local_aggregation(x, weight, 3, padding=1, padding_mode=name)
        assert torch.equal(layer(x, weight), expected)
    with pytest.raises(ValueError, match="pad_mode must be 0"):
        reference.LocalConvolution(16, 16, 3, pad_mode=2)
