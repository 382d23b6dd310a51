"""What the tests of all functions share: checks of values and layouts, and differentiable calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case
from layouts import LAYOUTS, assert_keeps_format
from oracle import Expected, Function, Tensors, evaluate, expected
from tolerances import check

from cotnet_ext import functional

# These arguments are maps [N, C, H, W]; the others are weights, logits and affine parameters.
MAPS = frozenset({"input", "value", "static", "dynamic"})


def is_map(function: Function, argument: str) -> bool:
    return argument in MAPS or (function.name == "spatial_softmax_gate" and argument == "logits")


def lay_out(
    function: Function, tensors: Tensors, device: torch.device, maps: str, others: str
) -> Tensors:
    """The arguments on a device, maps in one layout and all other tensors in another."""
    return {
        name: LAYOUTS[maps if is_map(function, name) else others](t.to(device))
        for name, t in tensors.items()
    }


def compare(
    results: Tensors,
    known: Expected,
    function: Function,
    *,
    strict: bool = False,
    where: Tensors | None = None,
) -> None:
    """Check every result against what is known; strict admits rounding only.

    Args:
        results: "output" and gradients by argument; absent ones are not compared.
        where: masks of the elements to compare, by the same keys.
    """
    for name, result in results.items():
        label = "output" if name == "output" else f"grad {name}"
        check(
            result,
            known.truth[name],
            name=f"{function.name} {label}",
            dtype=known.grad.dtype,
            magnitude=known.magnitude[name],
            reference=None if strict else known.same[name],
            where=None if where is None else where.get(name),
        )


def check_values(
    function: Function,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    maps: str = "contiguous",
    others: str = "contiguous",
    grad: str = "contiguous",
    strict: bool = False,
) -> None:
    """Output and all gradients of one function on one case, in the given layouts."""
    known = expected(function, case, dtype)
    tensors = lay_out(function, known.tensors, device, maps, others)
    grad_output = LAYOUTS[grad](known.grad.to(device))
    results = evaluate(function, functional, tensors, grad_output, case)
    compare(results, known, function, strict=strict)
    source = tensors[function.arguments[0]]
    if source.dim() == 4 and source.numel():
        assert_keeps_format(results["output"], source, f"{function.name} output")
        for name, t in tensors.items():
            # The gate's gradient of static is the incoming one itself, as that of any summand.
            summand = (function.name, name) == ("spatial_softmax_gate", "static")
            if is_map(function, name) and not summand:
                assert_keeps_format(results[name], t, f"{function.name} grad {name}")


def check_empty_batch(
    function: Function, case: Case, dtype: torch.dtype, device: torch.device, layout: str
) -> None:
    """A batch of zero gives an empty output, and zero gradients for everything without a batch."""
    tensors = {name: t.to(dtype) for name, t in function.make(case).items()}
    tensors = lay_out(function, tensors, device, layout, layout)
    grad = torch.ones(function.output_shape(case), dtype=dtype, device=device)
    results = evaluate(function, functional, tensors, grad, case)
    assert results.pop("output").shape == function.output_shape(case)
    for name, result in results.items():
        assert result.shape == tensors[name].shape, f"grad {name}: {list(result.shape)}"
        assert result.dtype == dtype
        assert torch.equal(result, torch.zeros_like(result)), f"grad {name} must be zero"


def as_function(function: Function, case: Case, module=functional) -> Callable[..., torch.Tensor]:
    """The function on one case, as a function of its tensor arguments by position."""
    return lambda *args: function.call(
        module, dict(zip(function.arguments, args, strict=True)), case
    )


def standard_arguments(
    function: Function,
    case: Case,
    device: torch.device,
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, ...]:
    """The standard random arguments, detached."""
    tensors = expected(function, case, dtype).tensors.values()
    return tuple(LAYOUTS[layout](t.to(device)) for t in tensors)


def leaves(args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(arg.detach().requires_grad_() for arg in args)


def weighted_sum(y: torch.Tensor) -> torch.Tensor:
    """A scalar with a weight of its own for every element of y (not random, for vmap's sake)."""
    weights = torch.arange(1, y.numel() + 1, device=y.device, dtype=torch.float64).cos()
    return (y * weights.view(y.shape).to(y.dtype)).sum()
