"""A model traced for export, and the comparison of what was exported with it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .. import _files

# How far results of an exported file may be from those of the model, relative to their norm.
TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


class ExportError(RuntimeError):
    """The model cannot be exported in this way, or the exported file does not do what it does."""


def trace(
    model: nn.Module, args: tuple, kwargs: dict[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    """The program of the model, with this package's operators in it."""
    check_arguments(model, args)
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)


def check_arguments(model: nn.Module, args: tuple) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(
            f"args must be the tuple of the model's positional arguments, got {type(args).__name__}"
        )
    training = next((name for name, part in model.named_modules() if part.training), None)
    if training is not None:
        where = f"its {training!r} is" if training else "it is"
        raise ValueError(f"model must be in evaluation mode, but {where} not: call model.eval()")


def forget_sources(program: ExportedProgram) -> None:
    """Drops which line of whose file each operator came from: up to half of a small program."""
    for node in program.graph.nodes:
        for name in ("stack_trace", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(name, None)


def compare(
    run: Callable[..., Any], model: nn.Module, samples: Sequence[tuple[tuple, dict]], what: str
) -> float:
    """The largest distance of `run(*args, **kwargs)` from the model, relative to its norm.

    Raises ExportError where it is more than rounding, or a result is missing.
    """
    worst = 0.0
    for args, kwargs in samples:
        with torch.no_grad():
            expected = tensors(model(*args, **kwargs))
            actual = tensors(run(*args, **kwargs))
        if len(actual) != len(expected):
            raise ExportError(f"{what} returns {len(actual)} tensors, the model {len(expected)}")
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            worst = max(worst, _distance(a, e, f"output {index} of {what}"))
    return worst


def _distance(actual: Tensor, expected: Tensor, what: str) -> float:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise ExportError(
            f"{what} is {actual.dtype} {list(actual.shape)}, "
            f"the model's is {expected.dtype} {list(expected.shape)}"
        )
    if not expected.is_floating_point():
        if not torch.equal(actual.cpu(), expected.cpu()):
            raise ExportError(f"{what} differs from the model's")
        return 0.0
    expected = expected.cpu().double()
    if not expected.isfinite().all():
        raise ExportError(f"{what} cannot be checked: the model's own is not finite")
    norm = torch.linalg.vector_norm(expected)
    error = torch.linalg.vector_norm(actual.cpu().double() - expected)
    distance = (error / norm).item() if norm else error.item()
    limit = TOLERANCE[actual.dtype]
    if not distance <= limit:
        raise ExportError(
            f"{what} is {distance:.2g} of its norm away from the model's, more than {limit:.2g}"
        )
    return distance


def tensors(results: Any) -> list[Tensor]:
    """The tensors of any nest of results, in order."""
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


@contextmanager
def replacing(path: str | os.PathLike, suffix: str) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` if nothing fails until the end."""
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"path must end in {suffix}, got {str(path)!r}")
    # The file is made under its own name, which archives have inside.
    with _files.replacing(path) as unfinished, tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / path.name
        shutil.copyfile(Path(folder) / path.name, unfinished)
