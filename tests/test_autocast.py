"""Autocast: floating arguments of mixed dtypes become the autocast dtype, float64 stays."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, dtype_id
from layouts import FORMATS, LAYOUTS
from oracle import EACH_FUNCTION, FUNCTIONS, NORM, Function, evaluate, expected
from tolerances import assert_same_bits
from torch.func import grad, jvp, vmap

from cotnet_ext import functional

HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=dtype_id)
CASE = CASES["odd_9x11"]


def _arguments(function: Function, device, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {n: t.to(device) for n, t in expected(function, CASE, dtype).tensors.items()}


def _mixtures(tensors: dict[str, torch.Tensor], half: torch.dtype):
    """All float32, and each argument in turn in half precision (the first is the normal case)."""
    yield tensors
    for name in tensors:
        yield tensors | {name: tensors[name].to(half)}


@EACH_FUNCTION
@HALVES
@FORMATS
def test_result_and_gradient_dtypes(function, half, layout, device):
    """The result is half, equals the function of cast arguments; gradients return in each dtype."""
    tensors = {n: LAYOUTS[layout](t) for n, t in _arguments(function, device).items()}
    upstream = expected(function, CASE, half).grad.to(device)
    plain = evaluate(
        function, functional, {n: t.to(half) for n, t in tensors.items()}, upstream, CASE
    )
    for mixed in _mixtures(tensors, half):
        leaves = {n: t.detach().requires_grad_() for n, t in mixed.items()}
        with torch.autocast(device.type, dtype=half):
            y = function.call(functional, leaves, CASE)
        assert y.dtype == half
        assert_same_bits(y, plain["output"], f"{function} under autocast")
        y.backward(upstream)
        for name, leaf in leaves.items():
            assert leaf.grad.dtype == mixed[name].dtype, name
            assert_same_bits(leaf.grad.to(half), plain[name], f"{function} grad {name}")


@EACH_FUNCTION
@HALVES
def test_float64_is_left_alone(function, half, device):
    tensors = _arguments(function, device, torch.float64)
    outside = function.call(functional, tensors, CASE)
    with torch.autocast(device.type, dtype=half):
        inside = function.call(functional, tensors, CASE)
        with pytest.raises(TypeError, match="must be"):
            first = function.arguments[0]
            function.call(functional, tensors | {first: tensors[first].float()}, CASE)
    assert_same_bits(inside, outside, str(function))


@EACH_FUNCTION
def test_a_disabled_region_casts_nothing(function, device):
    tensors = _arguments(function, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        with torch.autocast(device.type, enabled=False):
            assert function.call(functional, tensors, CASE).dtype == torch.float32
            first = function.arguments[0]
            with pytest.raises(TypeError, match="must be"):
                function.call(functional, tensors | {first: tensors[first].bfloat16()}, CASE)
        assert function.call(functional, tensors, CASE).dtype == torch.bfloat16
    assert function.call(functional, tensors, CASE).dtype == torch.float32


@EACH_FUNCTION
def test_autocast_of_another_device_casts_nothing(function, device):
    other = "cuda" if device.type == "cpu" else "cpu"
    before = torch.is_autocast_enabled(other)
    torch.set_autocast_enabled(other, True)
    try:
        assert function.call(functional, _arguments(function, device), CASE).dtype == torch.float32
    finally:
        torch.set_autocast_enabled(other, before)


@EACH_FUNCTION
def test_integers_are_still_refused(function, device):
    tensors = _arguments(function, device)
    last = function.arguments[-1]
    with torch.autocast(device.type, dtype=torch.bfloat16), pytest.raises(TypeError, match=last):
        function.call(functional, tensors | {last: tensors[last].long()}, CASE)


def test_missing_affine_parameters(device):
    tensors = _arguments(NORM, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = functional.group_norm_aggregation(tensors["input"], tensors["weight"], **CASE.geometry)
    assert y.dtype == torch.bfloat16


@EACH_FUNCTION
def test_arguments_by_name(function, device):
    """Keywords are cast like positions."""
    geometry = CASE.geometry if function.windowed else {}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = getattr(functional, function.name)(**_arguments(function, device), **geometry)
    assert y.dtype == torch.bfloat16


@EACH_FUNCTION
def test_backward_inside_the_region(function, device):
    """Also the double backward, whose pieces PyTorch itself would cast to and fro."""
    tensors = _arguments(function, device)

    def derivatives(inside: bool):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = function.call(functional, dict(zip(tensors, leaves, strict=True)), CASE)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inside):
            first = torch.autograd.grad(y.float().sin().sum(), leaves, create_graph=True)
            total = sum(g.float().sin().sum() for g in first)
            return *first, *torch.autograd.grad(total, leaves)

    for left, right in zip(derivatives(True), derivatives(False), strict=True):
        assert left.dtype == right.dtype == torch.float32
        largest = right.detach().abs().max()
        # Both round to bfloat16, in places that may differ.
        assert (left - right).abs().max() <= 0.05 * largest


@EACH_FUNCTION
def test_forward_mode_and_transforms(function, device):
    """Tangents follow the arguments into half precision; grad and vmap see the same casts."""
    tensors = _arguments(function, device)
    args = tuple(tensors.values())

    def f(*args):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return function.call(functional, dict(zip(tensors, args, strict=True)), CASE)

    y, tangent = jvp(f, args, tuple(torch.ones_like(arg) for arg in args))
    assert y.dtype == tangent.dtype == torch.bfloat16
    exact = tuple(arg.double() for arg in args)
    truth = jvp(
        lambda *a: function.call(functional, dict(zip(tensors, a, strict=True)), CASE),
        exact,
        tuple(torch.ones_like(arg) for arg in exact),
    )[1]
    assert (tangent - truth).abs().max() <= 0.05 * truth.abs().max()
    grads = grad(lambda *a: f(*a).float().sum(), argnums=tuple(range(len(args))))(*args)
    assert all(g.dtype == torch.float32 for g in grads)
    batched = vmap(f)(*(torch.stack((arg, 2 * arg)) for arg in args))
    assert batched.dtype == torch.bfloat16
    assert_same_bits(batched[0], f(*args), f"{function} vmap under autocast")


@EACH_FUNCTION
@pytest.mark.parametrize("where", ["around", "within"])
def test_compiled(function, where, device):
    """Autocast around a compiled function, and within it, without a graph break."""
    torch._dynamo.reset()
    tensors = _arguments(function, device)

    def plain(*args):
        return function.call(functional, dict(zip(tensors, args, strict=True)), CASE)

    def regional(*args):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return plain(*args)

    f = plain if where == "around" else regional
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for call in (compiled, f):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=where == "around"):
            y = call(*leaves)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    assert results[0][0].dtype == torch.bfloat16
    for left, right in zip(*results, strict=True):
        assert_same_bits(left, right, f"{function} {where}")


def test_a_layer_under_autocast(device):
    """A convolution makes half weights, CUDA's GroupNorm float32 ones; both are welcome."""
    conv = torch.nn.Conv2d(24, 27, 1, device=device)
    norm = torch.nn.GroupNorm(3, 27, device=device)
    x = _arguments(FUNCTIONS[0], device)["input"].requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        raw = conv(x)
        assert raw.dtype == torch.bfloat16
        weight = norm(raw).float().view(2, 1, 3, 9, 9, 11)
        unfused = functional.local_aggregation(x.bfloat16(), weight, **CASE.geometry)
        fused = functional.group_norm_aggregation(
            x, raw.view_as(weight), norm.weight, norm.bias, norm.eps, **CASE.geometry
        )
    assert unfused.dtype == fused.dtype == torch.bfloat16
    assert (fused - unfused).abs().max() <= 0.03 * unfused.abs().max()
    fused.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in (*conv.parameters(), *norm.parameters()))
