"""`group_norm_aggregation_pool` against its definition in float64, and this against PyTorch."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, Case, dtype_id, each, randn
from layouts import FORMATS, LAYOUTS
from torch.nn import functional as F

from cotnet_ext import _ops, reference
from cotnet_ext._group_norm_aggregation_pool import (
    defined_group_norm_aggregation_pool as defined,
)
from cotnet_ext._group_norm_aggregation_pool import group_norm_aggregation_pool

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
NAMES = ("input", "weight", "norm_weight", "norm_bias", "shift", "static")

# Of the largest element. 16-bit outputs are rounded twice: the aggregation, and what becomes of it.
OUTPUT = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MEANS = {**OUTPUT, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def arguments(case: Case, dtype: torch.dtype, layout: str = "contiguous") -> dict:
    """Sums far from zero, and shifts in the type of sums."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, c, *_ = case.output_shape
    made = {
        "input": randn(*case.input_shape, key=(case.name, 0)),
        "weight": randn(*case.weight_shape, key=(case.name, 1)) * 3 + 1,
        "norm_weight": randn(case.norm_size, key=(case.name, 2)) + 1,
        "norm_bias": randn(case.norm_size, key=(case.name, 3)),
        "shift": randn(c, key=(case.name, 4)),
        "static": randn(*case.output_shape, key=(case.name, 5)) + 0.5,
    }
    return {
        name: t.to(wide) if name == "shift" else LAYOUTS[layout](t.to(dtype))
        for name, t in made.items()
    }


def assert_defined(given: dict, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    on_device = [None if t is None else t.to(device) for t in given.values()]
    output, means = _ops.group_norm_aggregation_pool(*on_device, EPS, *case.op_geometry)
    doubled = (None if t is None else t.double() for t in given.values())
    truth = defined(*doubled, EPS, *case.op_geometry)
    assert output.dtype == dtype
    assert means.dtype == given["shift"].dtype
    for result, true, tolerance in zip((output, means), truth, (OUTPUT, MEANS), strict=True):
        error = (result.double().cpu() - true).abs().max()
        assert error <= tolerance[dtype] * true.abs().max()


@each(FILLED)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_values(case, dtype, layout, device):
    assert_defined(arguments(case, dtype, layout), case, dtype, device)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(
    "missing", [("static",), ("norm_weight",), ("norm_bias", "static")], ids=str
)
@FORMATS
def test_what_may_be_none(case, dtype, missing, layout, device):
    given = {**arguments(case, dtype, layout), **dict.fromkeys(missing)}
    assert_defined(given, case, dtype, device)


@each(CASES[name] for name in ("odd_9x11", "heads3", "k5"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["input", "weight", "static"])
def test_layouts(case, name, layout, device):
    given = arguments(case, torch.float32)
    given[name] = LAYOUTS[layout](given[name])
    assert_defined(given, case, torch.float32, device)


@each(EMPTY)
@FORMATS
def test_empty_batch(case, layout, device):
    given = [t.to(device) for t in arguments(case, torch.float32, layout).values()]
    output, means = _ops.group_norm_aggregation_pool(*given, EPS, *case.op_geometry)
    assert output.shape == case.output_shape
    assert means.shape == case.output_shape[:2]


@each(CASES[name] for name in ("stage4_512x7x7", "odd_9x11", "long_5x130"))
@FORMATS
def test_threads_do_not_change_a_bit(case, layout):
    given = arguments(case, torch.float32, layout).values()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(_ops.group_norm_aggregation_pool(*given, EPS, *case.op_geometry))
    finally:
        torch.set_num_threads(threads)
    for output, means in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(means, results[0][1])


@each(REPRESENTATIVE)
def test_the_definition_is_made_of_layers(case):
    """The aggregation of the specification, a sum, `F.silu` and a mean."""
    given = arguments(case, torch.float64)
    shift, static = given.pop("shift"), given.pop("static")
    output, means = defined(*given.values(), shift, static, EPS, *case.op_geometry)
    summed = reference.group_norm_aggregation(*given.values(), EPS, **case.geometry)
    expected = F.silu(summed + shift.view(-1, 1, 1))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(means, (expected + static).mean((2, 3)))


@FORMATS
def test_not_a_number_stays(layout, device):
    case = CASES["odd_9x11"]
    given = {name: t.to(device) for name, t in arguments(case, torch.float32, layout).items()}
    given["static"][1, 5, 2, 3] = torch.nan
    output, means = _ops.group_norm_aggregation_pool(*given.values(), EPS, *case.op_geometry)
    assert not output.isnan().any()
    assert means.isnan().sum() == 1
    given["input"][0, 3, 4, 4] = torch.nan
    output, means = _ops.group_norm_aggregation_pool(*given.values(), EPS, *case.op_geometry)
    assert output.isnan().sum() == 9
    assert means.isnan().sum() == 2


# ---- the function that layers call ---------------------------------------------------------------

PLAIN = CASES["odd_9x11"]


def call(given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return group_norm_aggregation_pool(*given.values(), EPS, PLAIN.kernel_size)


@pytest.mark.parametrize("wanted", [NAMES, ("shift",), ("input", "static")], ids=str)
def test_gradients_are_those_of_the_definition(wanted):
    given = {n: t.clone() for n, t in arguments(CASES["tiny_k3"], torch.float64).items()}
    leaves = [given[name].requires_grad_() for name in wanted]

    def function(*_):
        return group_norm_aggregation_pool(*given.values(), EPS, 3)

    assert torch.autograd.gradcheck(function, leaves)
    if wanted == NAMES:
        assert torch.autograd.gradgradcheck(function, leaves)


def test_recorded_or_not_is_the_same():
    given = arguments(PLAIN, torch.float32)
    plain = call(given)
    given["input"].requires_grad_()
    for result, recorded in zip(plain, call(given), strict=True):
        assert recorded.requires_grad
        torch.testing.assert_close(recorded, result)


def test_transforms():
    """`torch.func.grad`, `vmap` and forward mode give what the definition gives."""
    given = arguments(PLAIN, torch.float64)

    def loss(x, function):
        output, means = function(x)
        return output.square().sum() + means.sin().sum()

    def ours(x):
        return call({**given, "input": x})

    def theirs(x):
        others = [t for name, t in given.items() if name != "input"]
        return defined(x, *others, EPS, *PLAIN.op_geometry)

    x = given["input"]
    torch.testing.assert_close(torch.func.grad(loss)(x, ours), torch.func.grad(loss)(x, theirs))
    direction = (torch.ones_like(x),)
    torch.testing.assert_close(
        torch.func.jvp(ours, (x,), direction), torch.func.jvp(theirs, (x,), direction)
    )
    several = torch.stack([x, 2 * x])
    for mapped, one, two in zip(torch.vmap(ours)(several), ours(x), ours(2 * x), strict=True):
        torch.testing.assert_close(mapped, torch.stack([one, two]))


@pytest.mark.parametrize("mapped", NAMES)
def test_vmap_of_the_operator(mapped):
    given = arguments(PLAIN, torch.float64)
    place = NAMES.index(mapped)
    several = torch.stack([given[mapped], 2 * given[mapped]])

    def function(t):
        return _ops.group_norm_aggregation_pool(
            *(t if i == place else a for i, a in enumerate(given.values())),
            EPS,
            *PLAIN.op_geometry,
        )

    expected = [function(t) for t in several]
    for found, pair in zip(torch.vmap(function)(several), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(pair))


def test_autocast():
    given = arguments(PLAIN, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, means = call(given)
    assert output.dtype == torch.bfloat16
    assert means.dtype == torch.float32
    expected = call({n: t if n == "shift" else t.bfloat16() for n, t in given.items()})
    assert torch.equal(output, expected[0])
    assert torch.equal(means, expected[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """Without a graph break, with gradients too."""
    torch._dynamo.reset()
    given = arguments(PLAIN, torch.float64)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(given), call(given))
    grads = []
    for function in (compiled, call):
        given["input"] = given["input"].detach().requires_grad_()
        output, means = function(given)
        grads += torch.autograd.grad(output.sum() + means.sum(), given["input"])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("norm_weight", lambda t: t[1:], ValueError, "norm_weight must be [27], got [26]"),
        ("norm_bias", lambda t: t.half(), TypeError, "norm_bias must be torch.float32 like input"),
        ("shift", lambda t: t[1:], ValueError, "shift must be [24], got [23]"),
        ("static", lambda t: t.half(), TypeError, "static must be torch.float32 like input"),
        (
            "static",
            lambda t: t[:1],
            ValueError,
            "static must be [2, 24, 9, 11], got [1, 24, 9, 11]",
        ),
        ("weight", lambda t: t[:1], ValueError, "weight must be [2, G, Cw, 9, 9, 11]"),
    ],
)
def test_errors(name, change, error, words):
    given = arguments(PLAIN, torch.float32)
    given[name] = change(given[name])
    with pytest.raises(error) as refused:
        call(given)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("norm_weight", lambda t: t[1:], "norm_weight must be [27], got [26]"),
        ("shift", lambda t: t.double(), "shift must be float32"),
        ("shift", lambda t: t[1:], "shift must be [24], got [23]"),
        ("static", lambda t: t.half(), "static must have the dtype of input"),
        ("static", lambda t: t[:1], "static must be [2, 24, 9, 11], got [1, 24, 9, 11]"),
    ],
)
def test_raw_calls_are_checked(name, change, words):
    given = arguments(PLAIN, torch.float32)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError) as refused:
        _ops.group_norm_aggregation_pool(*given.values(), EPS, *PLAIN.op_geometry)
    assert words in str(refused.value)
