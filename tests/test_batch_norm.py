"""The operators of fused layers against their definitions in float64, and these against PyTorch."""

from __future__ import annotations

import pytest
import torch
from cases import dtype_id, randn
from torch import nn

from cotnet_ext import _batch_norm, _ops

SHAPES = (
    (2, 24, 7, 7),
    (3, 5, 3, 1),
    (2, 33, 56, 57),
    (1, 64, 130, 70),
    (2, 130, 6, 9),
    (1, 16, 1, 1),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)

# Of the largest element: sums of float32 are added up in double, 16-bit results are rounded once.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def arguments(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list:
    """Maps far from mean 0, and tables in the type of sums."""
    n, c, _, _ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g, x, k = (2 * randn(*shape, key=(name, i)) + 0.5 for i in range(3))
    g, x, k = (t.to(dtype) for t in (g, x, k))

    def table(*sizes: int) -> torch.Tensor:
        return (randn(*sizes, key=(name, sizes)) / 4 + 0.8).to(wide)

    contexts = [x, k, table(3, c), table(3, c) - 0.5]
    return {
        "batch_norm_statistics": [x, table(c), table(c), 1e-5],
        "batch_norm": [x, table(3, c), True],
        "batch_norm_backward": [g, x, table(3, c), table(c), True, True],
        "batch_norm_fusion_pool": contexts,
        "batch_norm_fusion": [*contexts, table(n, 2, c)],
        "batch_norm_fusion_sums": [g, *contexts],
        "batch_norm_fusion_backward": [
            g, x, contexts[2], table(c), table(n, 2, c), table(n, c),
            _ops.batch_norm_fusion_sums(g, *contexts), True,
        ],
    }[name]  # fmt: skip


def outputs(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_defined(name: str, args: list, dtype: torch.dtype) -> None:
    """The operator gives what its definition gives in float64."""
    doubled = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    truth = outputs(getattr(_batch_norm, f"defined_{name}")(*doubled))
    for result, true in zip(outputs(getattr(_ops, name)(*args)), truth, strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tolerance = TOLERANCE[result.dtype if result.dtype == dtype else wide]
        error = (result.double() - true).abs().max()
        assert error <= tolerance * true.abs().max(), name


def in_layout(args: list, layout: torch.memory_format) -> list:
    return [
        a.contiguous(memory_format=layout) if isinstance(a, torch.Tensor) and a.dim() == 4 else a
        for a in args
    ]


def on_device(args: list, device: torch.device) -> list:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", _ops.BATCH_NORM)
def test_defined_values(name, dtype, layout, shape, device, poisoned_memory):
    args = on_device(arguments(name, shape, dtype), device)
    assert_defined(name, in_layout(args, layout), dtype)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_defined_for_flags(relu, batch, device):
    shape = (2, 20, 9, 7)
    x, norm, _ = on_device(arguments("batch_norm", shape, torch.float64), device)
    assert_defined("batch_norm", [x, norm, relu], torch.float64)
    args = on_device(arguments("batch_norm_backward", shape, torch.float64), device)
    assert_defined("batch_norm_backward", [*args[:-2], relu, batch], torch.float64)
    args = on_device(arguments("batch_norm_fusion_backward", shape, torch.float64), device)
    assert_defined("batch_norm_fusion_backward", [*args[:-1], batch], torch.float64)


def test_norms_without_weight_or_bias(device):
    args = arguments("batch_norm_statistics", (2, 20, 9, 7), torch.float64)
    x, weight, bias, eps = on_device(args, device)
    for args in ([x, None, None, eps], [x, weight, None, eps], [x, None, bias, eps]):
        assert_defined("batch_norm_statistics", args, torch.float64)


@pytest.mark.parametrize("name", _ops.BATCH_NORM)
def test_defined_for_strided_maps(name, device):
    """Slices of larger maps, rows apart from each other."""
    args = on_device(arguments(name, (3, 20, 9, 7), torch.float32), device)
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and a.dim() == 4:
            larger = torch.full((3, 21, 9, 10), torch.nan, device=device)
            larger[:, :20, :, 2:9] = a
            args[i] = larger[:, :20, :, 2:9]
    assert_defined(name, args, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_statistics_far_from_zero(layout, device):
    """Squares around the mean, never differences of large squares: no digit is lost."""
    x = (randn(4, 8, 40, 40) + 1000).float().contiguous(memory_format=layout).to(device)
    *_, variance = _ops.batch_norm_statistics(x, None, None, 0.0)
    truth = x.double().var((0, 2, 3), correction=0)
    assert ((variance - truth).abs() <= 1e-6 * truth).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_not_a_number_stays(layout, device):
    x, norm, _ = on_device(arguments("batch_norm", (1, 16, 4, 4), torch.float32), device)
    x = x.contiguous(memory_format=layout)
    x[0, 3, 1, 2] = torch.nan
    assert _ops.batch_norm(x, norm, True).isnan().sum() == 1
    contexts = on_device(arguments("batch_norm_fusion", (1, 16, 4, 4), torch.float32), device)
    assert _ops.batch_norm_fusion(x, *contexts[1:]).isnan().sum() == 1
    assert _ops.batch_norm_fusion_pool(x, *contexts[1:4]).isnan().sum() == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None], ids=str)
def test_a_norm_is_the_module(training, affine, momentum):
    """`norm_of` with `batch_norm` is `nn.BatchNorm2d`: result, gradients and running statistics."""
    shape = (4, 6, 5, 7)
    torch.manual_seed(0)
    module = nn.BatchNorm2d(6, momentum=momentum, affine=affine).double().train(training)
    module.running_mean.uniform_()
    module.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(module.weight, 0.5, 2)
        nn.init.uniform_(module.bias)
    ours = nn.BatchNorm2d(6, momentum=momentum, affine=affine).double().train(training)
    ours.load_state_dict(module.state_dict())
    for turn in range(3):
        x, grad = randn(*shape, key=turn).requires_grad_(), randn(*shape, key=(turn, "grad"))
        y = module(x)
        wanted = [x, *module.parameters()]
        expected = torch.autograd.grad(y, wanted, grad)
        with torch.no_grad():
            norm = _batch_norm.norm_of(ours, x, ours.weight, ours.bias)
        torch.testing.assert_close(_ops.batch_norm(x, norm.table, False), y)
        found = _ops.batch_norm_backward(grad, x, norm.table, norm.factor, False, norm.batch)
        for actual, right in zip(found, expected, strict=False):
            torch.testing.assert_close(actual, right)
        for key, value in module.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


@pytest.mark.parametrize(
    ("name", "position", "change", "error", "words"),
    [
        ("batch_norm", 1, lambda t: t.double(), TypeError, "norm must be torch.float32"),
        ("batch_norm", 1, lambda t: t[:2], ValueError, "norm must be [3, 6], got [2, 6]"),
        ("batch_norm_statistics", 1, lambda t: t[1:], ValueError, "weight must be [6], got [5]"),
        ("batch_norm_backward", 3, lambda t: t[1:], ValueError, "factor must be [6]"),
        ("batch_norm_backward", 0, lambda t: t[1:], ValueError, "grad must be"),
        ("batch_norm_fusion", 3, lambda t: t[:2], ValueError, "static_norm must be [3, 6]"),
        ("batch_norm_fusion", 4, lambda t: t[:1], ValueError, "attention must be [2, 2, 6]"),
        ("batch_norm_fusion_sums", 2, lambda t: t[1:], ValueError, "static must be [2, 6, 4, 5]"),
        ("batch_norm_fusion_backward", 5, lambda t: t[:1], ValueError, "pooled must be [2, 6]"),
        ("batch_norm_fusion_backward", 6, lambda t: t[:1], ValueError, "sums must be [2, 6, 6]"),
    ],
)  # fmt: skip
def test_raw_operators_refuse_what_is_not_of_the_maps(name, position, change, error, words):
    """Direct calls are checked in C++, fakes in Python, with the same words."""
    args = arguments(name, (2, 6, 4, 5), torch.float32)
    args[position] = change(args[position])
    with pytest.raises(RuntimeError) as refused:
        getattr(_ops, name)(*args)
    assert words.replace("torch.", "") in str(refused.value)
    fakes = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(error) as refused:
        getattr(_ops, name)(*fakes)
    assert words in str(refused.value)
