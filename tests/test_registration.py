"""The operators as PyTorch sees them: schemas, fake kernels, autograd, compile, export."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, Case, dtype_id, each, randn
from layouts import FORMATS, LAYOUTS
from operators import COMPUTING, OPERATORS, SAMPLES, Sampler, mask_position, operator, without_grad
from oracle import EACH_FUNCTION, FUNCTIONS, NORM, Function, expected
from tolerances import DTYPES, assert_same_bits, check
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vjp, vmap
from torch.library import opcheck

from cotnet_ext import functional

EACH_OPERATOR = pytest.mark.parametrize("name", COMPUTING)
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No compiled code outlives its test, and none comes from a cache on disk."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        yield
    torch._dynamo.reset()


def test_every_operator_has_samples():
    assert set(OPERATORS) == set(SAMPLES)


# --- opcheck -------------------------------------------------------------------------------------

OPCHECK_SAMPLES = (
    ("tiny_k3", "contiguous", torch.float32),
    ("odd_9x11", "channels_last", torch.bfloat16),
    ("heads2_k5_stride2", "sliced", torch.float64),
    ("reflect_heads2_k4", "channels_last_sliced", torch.float16),
    ("one_channel", "transposed", torch.float32),
    ("empty_batch", "contiguous", torch.float32),
)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("case", "layout", "dtype"), OPCHECK_SAMPLES, ids=[f"{c}-{x}" for c, x, _ in OPCHECK_SAMPLES]
)
def test_opcheck(name, case, layout, dtype, device):
    """PyTorch's own checks: schema, autograd registration, fake kernel, dynamic AOT dispatch."""
    args = SAMPLES[name](Sampler(CASES[case], layout, dtype, device))
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "build_info":  # AOT dispatch compares tensors only
        utilities.append("test_aot_dispatch_dynamic")
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    opcheck(operator(name), args, test_utils=utilities, **tolerance)
    opcheck(operator(name), without_grad(args), test_utils=utilities, **tolerance)


# --- fake kernels --------------------------------------------------------------------------------


def _outputs(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _describe(t: torch.Tensor) -> tuple:
    """Everything a fake tensor must get right.

    Gradients of weights are 6-D views; there PyTorch's own `view` gives dimensions of size one
    another (meaningless) stride on fake tensors than on real ones.
    """
    strides = t.stride()
    if t.dim() == 6:
        strides = tuple(s for s, size in zip(strides, t.shape, strict=True) if size != 1)
    return tuple(t.shape), strides, t.dtype, t.storage_offset(), t.requires_grad


def _fake(args, mode: FakeTensorMode):
    return [
        mode.from_tensor(a).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in args
    ]


def _meta(a):
    """The argument on the meta device, with its strides to the letter (`to` tidies them up)."""
    if not isinstance(a, torch.Tensor):
        return a
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")


# Every way in which strides can be ambiguous, and every way in which sizes change.
SHAPES = tuple(
    CASES[name]
    for name in (
        "odd_9x11",
        "narrow_10x3",
        "map_1x1",
        "row_1x19",
        "column_19x1",
        "batch_33",
        "k2_grows",
        "padding0_one_output",
        "stride2",
        "dilation1x3",
        "heads3",
        "cw_equals_c",
        "cw_is_1",
        "one_channel",
        "one_channel_heads2",
        "reflect_grows",
        "empty_batch",
    )
)


@EACH_OPERATOR
@EACH_LAYOUT
def test_fake_results_are_laid_out_like_real_ones(name, layout, device):
    for case in SHAPES:
        args = SAMPLES[name](Sampler(case, layout, torch.float32, device))
        real = _outputs(operator(name)(*args))
        with FakeTensorMode() as mode:
            fake = _outputs(operator(name)(*_fake(args, mode)))
        assert [_describe(t) for t in fake] == [_describe(t) for t in real], case.name
        assert all(t.device.type == device.type for t in fake)
        meta = _outputs(operator(name)(*map(_meta, args)))
        assert [_describe(t)[:3] for t in meta] == [_describe(t)[:3] for t in real], case.name


@EACH_OPERATOR
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_fake_results_have_the_dtypes_of_real_ones(name, dtype, device):
    args = SAMPLES[name](Sampler(CASES["odd_9x11"], "contiguous", dtype, device))
    real = _outputs(operator(name)(*args))
    with FakeTensorMode() as mode:
        fake = _outputs(operator(name)(*_fake(args, mode)))
    assert [_describe(t) for t in fake] == [_describe(t) for t in real]


@pytest.mark.parametrize("name", [name for name in COMPUTING if mask_position(name) is not None])
def test_fake_results_of_masked_gradients(name, device):
    args = SAMPLES[name](Sampler(CASES["odd_9x11"], "channels_last", torch.float32, device))
    position = mask_position(name)
    for mask in itertools.product([False, True], repeat=len(args[position])):
        masked = list(without_grad(args))
        masked[position] = list(mask)
        real = _outputs(operator(name)(*masked))
        with FakeTensorMode() as mode:
            fake = _outputs(operator(name)(*_fake(masked, mode)))
        assert [_describe(t) for t in fake] == [_describe(t) for t in real], mask


@EACH_FUNCTION
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_sliced"])
def test_functions_forward_and_backward_in_fake_mode(function, layout, device):
    """The public functions run on fake tensors, and gradients come out with real strides."""

    def run(convert):
        args = [convert(t).detach().requires_grad_() for t in tensors]
        y = function.call(functional, dict(zip(function.arguments, args, strict=True)), case)
        return [y, *torch.autograd.grad(y.square().sum(), args)]

    case = CASES["heads2"]
    known = expected(function, case, torch.float32)
    tensors = [LAYOUTS[layout](t.to(device)) for t in known.tensors.values()]
    real = run(lambda t: t)
    with FakeTensorMode() as mode:
        fake = run(mode.from_tensor)
    assert [_describe(t) for t in fake] == [_describe(t) for t in real]


@EACH_FUNCTION
def test_functions_on_the_meta_device(function):
    """`device="meta"` computes shapes and strides only, for channels_last too."""
    case = CASES["heads2"]
    known = expected(function, case, torch.float32)
    for layout in ("contiguous", "channels_last"):
        real = {name: LAYOUTS[layout](t) for name, t in known.tensors.items()}
        meta = {name: t.to("meta").requires_grad_() for name, t in real.items()}
        y = function.call(functional, meta, case)
        assert y.device.type == "meta"
        assert y.stride() == function.call(functional, real, case).stride()
        y.sum().backward()
        assert all(t.grad.shape == t.shape for t in meta.values())


# --- direct calls --------------------------------------------------------------------------------


@EACH_OPERATOR
@FORMATS
@each([CASES["tiny_k3"], CASES["tiny_k2_stride2x1"], CASES["tiny_reflect"]])
def test_direct_calls_keep_gradients(name, case, layout, device):
    """`torch.ops.cotnet_ext.*` called by hand is differentiable, and rightly so."""
    args = SAMPLES[name](Sampler(case, layout, torch.float64, device))
    variables = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]

    def call(*values):
        full = list(args)
        for i, value in zip(variables, values, strict=True):
            full[i] = value
        if name == "group_norm_aggregation_backward":
            # Mean and rstd are functions of the weight, and its gradient accounts for them.
            full[3:5] = Sampler(case, layout, torch.float64, device).statistics(full[2])
        if name == "batch_norm_fusion_backward":
            # The sums are functions of the other arguments. Those it reads do not see the static.
            grad, dynamic, norm = full[:3]
            full[6] = operator("batch_norm_fusion_sums")(grad, dynamic, dynamic, norm, norm)
        results = _outputs(operator(name)(*full))
        return tuple(result for result in results if result.requires_grad)

    leaves = tuple(args[i] for i in variables)
    assert call(*leaves), "no result requires grad"
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@EACH_FUNCTION
def test_direct_calls_equal_the_functions(function, device):
    case = CASES["heads2"]
    args = SAMPLES[function.name](Sampler(case, "contiguous", torch.float32, device))
    direct = _outputs(operator(function.name)(*args))[0]
    tensors = dict(zip(function.arguments, args, strict=False))
    assert_same_bits(direct, function.call(functional, tensors, case), str(function))
    leaves = list(tensors.values())
    grads = [
        torch.autograd.grad(y.square().sum(), leaves)
        for y in (direct, function.call(functional, tensors, case))
    ]
    for name, left, right in zip(tensors, *grads, strict=True):
        assert_same_bits(left, right, f"{function} grad {name}")


def test_statistics_of_the_norm(device):
    """The raw forward also returns mean and rstd of each group, in the dtype of the sums."""
    case = CASES["heads2"]
    for dtype in DTYPES:
        sampler = Sampler(case, "contiguous", dtype, device)
        args = SAMPLES["group_norm_aggregation"](sampler)
        _, mean, rstd = operator("group_norm_aggregation")(*args)
        exact = (
            expected(NORM, case, dtype).tensors["weight"].to(torch.float64).flatten(3).flatten(1, 2)
        )
        variance = exact.var(2, unbiased=False)
        for ours, truth in ((mean, exact.mean(2)), (rstd, (variance + 1e-5).rsqrt())):
            size = exact.abs().mean(2) if ours is mean else truth
            check(ours, truth, name=f"statistics {dtype}", magnitude=size)
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# --- torch.compile -------------------------------------------------------------------------------

# Sizes all differ, so that no two dimensions are taken for the same symbol; the second problem
# changes every one that may change.
FIRST = Case("compile_first", 3, 12, 2, 4, (3, 5), 1, (1, 2), 1, "zeros", 10, 13)
SECOND = Case("compile_second", 5, 20, 2, 10, (3, 5), 1, (1, 2), 1, "zeros", 7, 16)
STRIDED = (
    Case("strided_first", 3, 12, 1, 6, (3, 5), (2, 1), (2, 1), (1, 2), "reflect", 13, 20),
    Case("strided_second", 5, 24, 1, 8, (3, 5), (2, 1), (2, 1), (1, 2), "reflect", 14, 13),
)
PLAIN = (FIRST, SECOND)
# (backend, layout, problems); the default backend takes seconds each, so it meets a selection.
COMPILED = (
    ("inductor", "contiguous", PLAIN),
    ("inductor", "channels_last", STRIDED),
    ("aot_eager", "contiguous", PLAIN),
    ("aot_eager", "contiguous", STRIDED),
    ("aot_eager", "channels_last", PLAIN),
    ("aot_eager", "channels_last", STRIDED),
)


def _compile(f, backend: str):
    return torch.compile(f, fullgraph=True, dynamic=True, backend=backend)


def _model(function: Function, case: Case):
    """The function with ordinary operations before and after it."""

    def model(*args):
        args = [torch.sin(args[0]), *args[1:]]
        y = function.call(functional, dict(zip(function.arguments, args, strict=True)), case)
        return torch.tanh(y) * 2

    return model


def _run(model, function: Function, case: Case, layout: str, device) -> list[torch.Tensor]:
    tensors = expected(function, case, torch.float64).tensors.values()
    args = [LAYOUTS[layout](t.to(device)).detach().requires_grad_() for t in tensors]
    y = model(*args)
    weights = randn(*y.shape, key="compiled").to(device)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), args)]


@EACH_FUNCTION
@pytest.mark.parametrize(
    ("backend", "layout", "problems"),
    COMPILED,
    ids=[
        f"{backend}-{layout}-{'plain' if p is PLAIN else 'strided'}"
        for backend, layout, p in COMPILED
    ],
)
def test_compile(function, backend, layout, problems, device):
    """Forward and backward without a graph break, and without recompiling for other sizes."""
    model = _model(function, problems[0])
    compiled = _compile(model, backend)
    for number, case in enumerate(problems):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            ours = _run(compiled, function, case, layout, device)
        eager = _run(model, function, case, layout, device)
        for name, left, right in zip(("output", *function.arguments), ours, eager, strict=True):
            label = f"{function} compiled {name} {case.name}"
            largest = right.abs().max().expand(right.shape)
            check(left, right.cpu(), name=label, magnitude=largest.cpu())
            if name != "static":  # the gate hands on the incoming gradient, whatever its strides
                assert left.stride() == right.stride(), label


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_without_gradients(backend, device):
    """All functions in one graph, as in inference."""

    def model(*arguments):
        return [
            function.call(
                functional, dict(zip(function.arguments, args, strict=True)), FIRST
            ).relu()
            for function, args in zip(FUNCTIONS, arguments, strict=True)
        ]

    arguments = [
        tuple(t.to(device) for t in expected(function, FIRST, torch.float32).tensors.values())
        for function in FUNCTIONS
    ]
    compiled = _compile(model, backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(compiled(*arguments), model(*arguments))


@EACH_FUNCTION
def test_compiled_results_equal_eager_bits_without_fusion(function, device):
    """aot_eager runs the same kernels on the same strides: the bits agree, forward and backward."""
    compiled = _compile(_model(function, FIRST), "aot_eager")
    ours = _run(compiled, function, FIRST, "channels_last", device)
    eager = _run(_model(function, FIRST), function, FIRST, "channels_last", device)
    for left, right in zip(ours, eager, strict=True):
        assert_same_bits(left, right, str(function))


TRANSFORMS = {
    "vmap": lambda f, args: vmap(f)(*(torch.stack((a, 2 * a)) for a in args)),
    "jvp": lambda f, args: jvp(f, args, args),
    "grad": lambda f, args: grad(lambda *a: f(*a).sin().sum())(*args),
    "vjp": lambda f, args: vjp(f, *args)[1](f(*args)),
}


@EACH_FUNCTION
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_in_compiled_functions_are_right_or_refused(function, transform, device):
    """PyTorch does not support every transform under torch.compile; a wrong number is no option."""

    def f(*args):
        return function.call(functional, dict(zip(function.arguments, args, strict=True)), FIRST)

    def transformed(*args):
        return TRANSFORMS[transform](f, args)

    tensors = expected(function, FIRST, torch.float64).tensors.values()
    args = tuple(t.to(device) for t in tensors)
    try:
        ours = torch.compile(transformed, backend="aot_eager")(*args)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, NotImplementedError):
        assert transform != "vmap"
        return
    torch.testing.assert_close(ours, transformed(*args))


# --- torch.export --------------------------------------------------------------------------------


class _Module(torch.nn.Module):
    def __init__(self, function: Function, case: Case):
        super().__init__()
        self.function, self.case = function, case

    def forward(self, *args):
        tensors = dict(zip(self.function.arguments, args, strict=True))
        return self.function.call(functional, tensors, self.case)


@EACH_FUNCTION
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export(function, strict, device):
    """One exported graph with our operator in it serves every batch and map size."""
    module = _Module(function, FIRST)
    dims = [torch.export.Dim.AUTO]

    def args(case):
        tensors = expected(function, case, torch.float32).tensors
        # Channels stay: only batch and map are dynamic.
        return tuple(t.to(device) for t in tensors.values())

    larger = Case("export_larger", 4, 12, 2, 4, (3, 5), 1, (1, 2), 1, "zeros", 8, 21)
    first, second = args(FIRST), args(larger)
    shapes = tuple(
        {axis: dims[0] for axis in range(a.dim()) if a.shape[axis] != b.shape[axis]}
        for a, b in zip(first, second, strict=True)
    )
    program = torch.export.export(module, first, dynamic_shapes=(shapes,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert f"cotnet_ext.{function.name}.default" in targets
    for example in (first, second):
        assert_same_bits(program.module()(*example), module(*example), str(function))
        decomposed = program.run_decompositions()
        assert_same_bits(decomposed.module()(*example), module(*example), str(function))


@EACH_FUNCTION
def test_exported_programs_survive_a_file(function, device, tmp_path):
    module = _Module(function, FIRST)
    tensors = expected(function, FIRST, torch.float32).tensors.values()
    args = tuple(t.to(device) for t in tensors)
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(module, args), path)
    loaded = torch.export.load(path).module()
    assert_same_bits(loaded(*args), module(*args), str(function))
