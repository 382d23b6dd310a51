"""Whether the forward of a module is the function of its sub-modules that ours is."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .. import _checks, compat, modules
from .family import Refusal, shallow_copy

# What the original local convolutions accept and ignore, and the value at which that is the same.
_IGNORED = {"pad_mode": 0}
_IGNORED_BY = {compat.LocalConvolutionDilate: {"stride": 1}}

# What a forward raises before it calls a sub-module where something is missing on this machine.
_UNABLE = (ImportError, NotImplementedError, RuntimeError, AssertionError)


def _check_arity(module: nn.Module, count: int) -> None:
    """Refuses a forward that could be called with other arguments than ours."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != count or any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = ", ".join(p.name for p in parameters)
        raise Refusal(f"its forward takes ({names}), expected {count} argument(s)")


def check_forward(module: nn.Module, twin: nn.Module, known: dict[object, str | Refusal]) -> str:
    """Refuses a layer whose forward is another function of its sub-modules than ours; a remark.

    `known` remembers the remarks, or refusals, for layers that differ in their weights only.
    """
    if type(module).forward is nn.Module.forward:  # it has none to compare
        return ""
    _check_arity(module, 1)
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    plain.pop("training")
    others = {k for k in vars(module) if not k.startswith("_")} - plain.keys() - {"training"}
    key = (type(module), type(twin), twin.dim, twin.kernel_size, *sorted(plain.items()))
    if others or key not in known:
        known[key] = _compare_forward(module, twin)
    if isinstance(known[key], Refusal):
        raise known[key]
    return known[key]


def _compare_forward(module: nn.Module, twin: nn.Module) -> str | Refusal:
    """Runs its forward and ours on a small map with fresh sub-modules."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        ours = type(twin)(twin.dim, twin.kernel_size).float()
        theirs = shallow_copy(module)
        theirs.__dict__["_modules"] = dict(ours._modules)
        begun: list[nn.Module] = []
        for part in ours.children():
            part.register_forward_pre_hook(lambda part, _: begun.append(part))
        x = torch.randn(2, twin.dim, 8, 16, dtype=torch.float32)  # windows of 2, 4 and 8 fit
        for training in (False, True):
            ours.train(training)
            theirs.__dict__["training"] = training
            try:
                actual = type(module).forward(theirs, x.clone())
            except Exception as error:
                if isinstance(error, _UNABLE) and not begun:
                    return _not_compared(error)
                return Refusal(f"its forward fails on a map {list(x.shape)}: {_first_line(error)}")
            if not _is_close(actual, ours(x)):
                mode = "training" if training else "evaluation"
                return Refusal(f"its forward gives other numbers in {mode}")
    return ""


def _is_close(actual: object, expected: Tensor) -> bool:
    return (
        isinstance(actual, Tensor)
        and actual.shape == expected.shape
        and torch.allclose(actual.to(expected), expected, rtol=1e-3, atol=1e-4)
    )


def _not_compared(error: Exception) -> str:
    return f"not compared, as its forward does not run on the CPU: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def local_twin(module: nn.Module, ours: type[nn.Module]) -> tuple[nn.Module, str]:
    """Our local convolution with the attributes of `module`, and a remark."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        raise Refusal(f"it has parameters or sub-modules, which {ours.__name__} has not")
    arguments = {}
    for name in inspect.signature(ours).parameters:
        if hasattr(module, name):
            arguments[name] = getattr(module, name)
        elif name != "pad_mode":  # which older copies lack
            raise Refusal(f"it has no {name}, which {ours.__name__} has")
    try:
        twin = ours(**arguments)
        inputs = _local_inputs(twin)
    except (TypeError, ValueError) as error:
        raise Refusal(str(error)) from None
    if type(module).forward is nn.Module.forward:
        return twin, ""
    _check_arity(module, len(inputs))
    try:
        actual = type(module).forward(shallow_copy(module), *(t.clone() for t in inputs))
    except Exception as error:  # the originals need CuPy and a GPU
        return twin, _check_ignored(module, twin, error)
    if not _is_close(actual, twin(*inputs)):
        raise Refusal("its forward gives other numbers")
    return twin, ""


def _check_ignored(module: nn.Module, twin: nn.Module, error: Exception) -> str:
    """A remark on an original that cannot run here; refuses settings that it ignores."""
    for name, value in (_IGNORED | _IGNORED_BY.get(type(twin), {})).items():
        if getattr(twin, name, value) != value:
            raise Refusal(
                f"its {name}={getattr(module, name)} is ignored by the original and honoured by "
                f"{type(twin).__name__}; set it to {value} to keep the numbers"
            )
    return _not_compared(error)


def _local_inputs(twin: nn.Module) -> list[Tensor]:
    """Small arguments for the forward of a local convolution of ours."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    if isinstance(twin, compat.LocalConvolutionDilate):
        taps = _checks.pair("kernel_size", twin.kernel_size, 1)
        stride = _checks.pair("stride", twin.stride, 1)
        size = [(9 - 1) // s + 1 for s in stride]
        return [
            random(1, 4, 9, 9),
            random(1, 1, 2, taps[0] * taps[1], *size),
            torch.tensor([1, 2], device="cpu"),
        ]
    suffixes = ("",) if isinstance(twin, modules.LocalConvolution) else ("1", "2")
    windows = [
        _checks.window(
            getattr(twin, f"kernel_size{suffix}"),
            twin.stride,
            getattr(twin, f"padding{suffix}"),
            twin.dilation,
            "zeros",
        )
        for suffix in suffixes
    ]
    side = 3 + max(
        d * (k - 1) + p for w in windows for k, d, p in zip(w[0], w[3], w[2], strict=True)
    )
    weights = []
    heads, channels = getattr(twin, "head_num", 1), getattr(twin, "w_channels", 2)
    for kernel, stride, padding, dilation, _ in windows:
        size = [
            _checks.output_size(side, *pair)
            for pair in zip(kernel, stride, padding, dilation, strict=True)
        ]
        weights.append(random(1, heads, channels, kernel[0] * kernel[1], *size))
    if isinstance(twin, compat.LocalConvolutionMixMerge):
        weights = [torch.cat([weight.flatten(1, 3) for weight in weights], dim=1)]
    return [random(1, 2 * channels, side, side), *weights]
