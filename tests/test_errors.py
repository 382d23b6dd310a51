"""Bad arguments: the right exception, a message that names the argument, and nothing ever runs.

`TypeError` for a wrong dtype or type, `ValueError` for wrong shapes, sizes, devices or modes, alike
in eager mode, in fake mode, on the meta device and under `torch.compile`.
"""

from __future__ import annotations

import re

import pytest
import torch
from bad_arguments import MISTAKES, RIGHT, Mistake
from cases import CASES
from operators import COMPUTING, SAMPLES, Sampler, operator, without_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cotnet_ext
from cotnet_ext import functional

EACH_MISTAKE = pytest.mark.parametrize("mistake", MISTAKES, ids=str)
ON_ONE_DEVICE = [mistake for mistake in MISTAKES if not mistake.moves_device]


class _NothingRuns(TorchDispatchMode):
    """Fails when an operator of ours is reached."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "cotnet_ext", f"{func} ran on bad arguments"
        return func(*args, **(kwargs or {}))


def _call(mistake: Mistake, convert) -> pytest.ExceptionInfo:
    with pytest.raises(mistake.error) as caught:
        getattr(functional, mistake.function)(**mistake.arguments(convert))
    assert type(caught.value) is mistake.error
    return caught


def _assert_message(message: str, mistake: Mistake) -> None:
    pattern = ".*".join(re.escape(part) for part in mistake.parts)
    assert re.search(pattern, message, re.DOTALL), f"{mistake.parts} not in: {message}"


@EACH_MISTAKE
def test_eager(mistake, device):
    with _NothingRuns():
        caught = _call(mistake, lambda t: t.to(device))
    _assert_message(str(caught.value), mistake)


@EACH_MISTAKE
def test_with_gradients(mistake, device):
    """The same with arguments that require grad, where another layer stands in front."""

    def convert(t):
        return t.to(device).requires_grad_(t.is_floating_point())

    with _NothingRuns():
        caught = _call(mistake, convert)
    _assert_message(str(caught.value), mistake)


@EACH_MISTAKE
def test_fake_mode(mistake, device):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        caught = _call(mistake, lambda t: mode.from_tensor(t.to(device)))
    _assert_message(str(caught.value), mistake)


@pytest.mark.parametrize("mistake", ON_ONE_DEVICE, ids=str)
def test_meta_device(mistake):
    caught = _call(mistake, lambda t: t.to("meta"))
    _assert_message(str(caught.value), mistake)


def _compiled(mistake: Mistake, device: torch.device, error: type[Exception], **options) -> str:
    """The message of the compiled call's exception."""
    torch._dynamo.reset()
    function = getattr(functional, mistake.function)
    compiled = torch.compile(lambda kwargs: function(**kwargs) + 1, backend="aot_eager", **options)
    with pytest.raises(error) as caught:
        compiled(mistake.arguments(lambda t: t.to(device)))
    return str(caught.value)


@EACH_MISTAKE
def test_compiled(mistake, device):
    """`torch.compile` hands the error through."""
    _assert_message(_compiled(mistake, device, mistake.error), mistake)


@pytest.mark.parametrize(
    "mistake", [m for m in ON_ONE_DEVICE if m.function == "local_aggregation"], ids=str
)
def test_compiled_without_graph_breaks(mistake, device):
    """With fullgraph=True Dynamo wraps every error in its own; ours must be readable inside it."""
    wrapper = torch._dynamo.exc.TorchDynamoException
    message = _compiled(mistake, device, wrapper, fullgraph=True, dynamic=False)
    assert mistake.error.__name__ in message
    _assert_message(message.replace("\\", ""), mistake)  # quotes come escaped


# --- devices without kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("function", RIGHT)
def test_cuda_tensor_in_a_cpu_build(function, monkeypatch):
    """One sentence: this is a CPU build, and how to build with CUDA."""
    monkeypatch.setattr("cotnet_ext._checks._built_with_cuda", lambda: False)
    with FakeTensorMode():
        arguments = {
            name: torch.zeros(value.shape, device="cuda")
            if isinstance(value, torch.Tensor)
            else value
            for name, value in RIGHT[function]().items()
        }
        with pytest.raises(ValueError, match=r"cuda.*CPU.*COTNET_EXT_CUDA=1") as caught:
            getattr(functional, function)(**arguments)
    assert next(iter(arguments)) in str(caught.value)


def test_sparse_and_quantized_tensors():
    """Tensors without strides are refused as tensors of a wrong type, whichever argument it is."""
    right = RIGHT["local_aggregation"]()
    for name in ("input", "weight"):
        with pytest.raises((TypeError, ValueError), match=name):
            functional.local_aggregation(**(right | {name: right[name].to_sparse()}))
    gate = RIGHT["spatial_softmax_gate"]()
    with pytest.raises((TypeError, ValueError), match="value"):
        functional.spatial_softmax_gate(**(gate | {"value": gate["value"].to_mkldnn()}))


# --- sizes at the edge ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**70])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_huge_window_arguments(name, size, device):
    """No overflow of index arithmetic lets a nonsensical window through."""
    arguments = RIGHT["local_aggregation"]()
    arguments |= {k: arguments[k].to(device) for k in ("input", "weight")} | {name: size}
    if name == "stride" and size == 2**31 - 1:  # legal: one position remains
        arguments["weight"] = arguments["weight"][..., :1, :1].contiguous()
        assert functional.local_aggregation(**arguments).shape == (2, 64, 1, 1)
    else:
        with pytest.raises(ValueError):
            functional.local_aggregation(**arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_maps_without_pixels(requires_grad, device):
    """An input without rows has only padding in its windows; nothing is read, nothing crashes."""
    x = torch.zeros(2, 8, 0, 5, device=device, requires_grad=requires_grad)
    w = torch.ones(2, 1, 4, 9, 2, 7, device=device, requires_grad=requires_grad)
    try:
        y = functional.local_aggregation(x, w, 3, padding=2)
    except ValueError:
        pass
    else:
        assert torch.equal(y, torch.zeros(2, 8, 2, 7, device=device))
        if requires_grad:
            y.sum().backward()
            assert torch.equal(w.grad, torch.zeros_like(w))
    for shape in ((2, 3, 0, 4), (2, 0, 4, 4)):
        maps = [torch.zeros(shape, device=device, requires_grad=requires_grad) for _ in range(3)]
        pair = torch.zeros(*shape[:2], 2, device=device, requires_grad=requires_grad)
        for call in (
            lambda maps=maps: functional.spatial_softmax_gate(*maps),
            lambda maps=maps, pair=pair: functional.context_fusion(*maps[:2], pair),
        ):
            try:
                y = call()
            except ValueError:
                continue
            assert y.shape == shape
            if requires_grad:
                y.sum().backward()


# --- raw operators -------------------------------------------------------------------------------


def _spoilt(args: tuple, kind: type = object) -> list[tuple[str, tuple]]:
    """Ways to spoil one argument (of this kind) of a raw call, which the operator must notice."""
    found = []
    for i, arg in enumerate(args):
        if not isinstance(arg, kind):
            continue
        if isinstance(arg, torch.Tensor):
            integers = torch.zeros(arg.shape, dtype=torch.int64)
            versions = {
                "dtype": arg.to(torch.float16),
                "integers": integers,
                "missing dimension": arg.flatten(0, 1) if arg.dim() > 1 else arg.sum(),
                "extra dimension": arg.unsqueeze(0),
                "longer": torch.cat([arg, arg], dim=-1),
                "longer in front": torch.cat([arg, arg], dim=0),
                "empty": arg[..., :0],
                "scalar": torch.zeros(()),
            }
        elif isinstance(arg, list) and arg and not isinstance(arg[0], bool):
            versions = {
                "zeros": [0, 0],
                "negative": [-1, -1],
                "short": arg[:1] * 0,
                "long": [*arg, 1],
                "large": [2**62, 2**62],
                "largest": [2**63 - 1, 2**63 - 1],
            }
            if min(arg) == 0:
                del versions["zeros"]
        elif isinstance(arg, str):
            versions = {"unknown mode": "circular"}
        elif isinstance(arg, int) and not isinstance(arg, bool):
            versions = {"zero": 0, "negative": -4, "large": 2**62}
        else:
            continue
        for how, value in versions.items():
            found.append((f"argument {i} {how}", (*args[:i], value, *args[i + 1 :])))
    return found


# With one map alone, one of another size, or of a dtype whose sums are float32 too, is as right.
ONE_MAP = {f"argument 0 {how}" for how in ("dtype", "longer", "longer in front", "empty")}
RIGHT_AS_WELL = {"batch_norm": ONE_MAP, "batch_norm_statistics": ONE_MAP}


@pytest.mark.parametrize("name", COMPUTING)
def test_raw_operators_refuse_what_they_cannot_compute(name, device):
    """Direct calls get a RuntimeError from C++; no crash, no result from memory of others."""
    case = CASES["heads2"]
    args = without_grad(SAMPLES[name](Sampler(case, "contiguous", torch.float32, device)))
    operator(name)(*args)
    accepted = []
    for how, spoilt in _spoilt(args):
        spoilt = [a.to(device) if isinstance(a, torch.Tensor) else a for a in spoilt]
        try:
            operator(name)(*spoilt)
        except RuntimeError as error:
            assert "Could not run" not in str(error), how
        else:
            accepted.append(how)
    assert set(accepted) == RIGHT_AS_WELL.get(name, set())


@pytest.mark.parametrize("name", RIGHT)
def test_raw_operators_refuse_tensors_in_fake_mode_too(name, device):
    """What the kernel refuses must not pass as a fake result either: graphs would meet it late."""
    case = CASES["heads2"]
    args = without_grad(SAMPLES[name](Sampler(case, "contiguous", torch.float32, device)))
    accepted = []
    for how, spoilt in _spoilt(args, torch.Tensor):
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in spoilt]
            try:
                operator(name)(*fake)
            except Exception:  # any: there is no result
                continue
            accepted.append(how)
    assert set(accepted) == RIGHT_AS_WELL.get(name, set())


def test_the_library_says_what_it_is():
    info = cotnet_ext.build_info()
    assert {
        "version",
        "cuda",
        "cuda_version",
        "cuda_archs",
        "torch_target",
        "compiler",
        "cpu_capability",
    } <= set(info)
    assert isinstance(info["cuda"], bool)
