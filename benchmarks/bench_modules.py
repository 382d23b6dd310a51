"""The modules against the reference modules with the same parameters; training steps of contextual
layers against the compiled reference too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from cotnet_ext import modules, reference

from . import baselines
from .comparison import SUBJECT, Comparison, Contender, Function, Options
from .harness import measure
from .inputs import Maps
from .shapes import COT_ATTENTION, COT_ATTENTION_TRAIN, COT_LAYER_EVAL, COT_LAYER_TRAIN, Shape


@dataclass(frozen=True)
class Case:
    """A module class, by its name in `modules` and in `reference`, and where it is compared."""

    name: str
    eval_shapes: tuple[Shape, ...]
    train_shapes: tuple[Shape, ...]
    compiled: bool = False  # whether a training step is compared with the compiled reference


CASES = (
    Case("CoTAttention", COT_ATTENTION, COT_ATTENTION_TRAIN),
    Case("CotLayer", COT_LAYER_EVAL, COT_LAYER_TRAIN, compiled=True),
    Case("CoXtLayer", COT_LAYER_EVAL, COT_LAYER_TRAIN, compiled=True),
)


def rows(options: Options) -> Iterator[dict]:
    for case in CASES:
        for direction, shapes in (("eval", case.eval_shapes), ("train step", case.train_shapes)):
            for shape in options.shapes(shapes):
                contenders = _contenders(case, shape, options)
                if direction == "train step" and case.compiled and _compiles(options):
                    contenders.append(_compiled(contenders[-1]))
                comparison = Comparison(case.name, direction, shape, contenders, keep_results=False)
                yield from measure(comparison, options)


def _contenders(case: Case, shape: Shape, options: Options) -> list[Contender]:
    theirs = build(getattr(reference, case.name), shape, options.device)
    ours = build(getattr(modules, case.name), shape, options.device)
    ours.load_state_dict(theirs.state_dict())
    truth = build(getattr(reference, case.name), shape, options.device)
    truth.load_state_dict(theirs.state_dict())

    def contender(provider: str, module: Function, layout: str = "contiguous") -> Contender:
        return Contender(provider, module, truth, Maps(shape, layout=layout, device=options.device))

    return [
        contender(SUBJECT, ours),
        contender(SUBJECT, ours, "channels_last"),
        contender("reference", theirs),
    ]


def _compiles(options: Options) -> bool:
    return options.compiled and not options.quick


def _compiled(eager: Contender) -> Contender:
    """Inductor sums a channel's pixels one by one where eager PyTorch sums in pairs: of tens of
    thousands, it loses some times more. That is a peer to beat all the same."""
    return replace(
        eager,
        provider=f"{eager.provider}, compiled",
        function=baselines.compiled(eager.function),
        leeway=10,
    )


def build(kind: Callable[[int, int], nn.Module], shape: Shape, device: str) -> nn.Module:
    """A module whose norms are not the identity they start as."""
    torch.manual_seed(0)
    with torch.device(device):
        module = kind(shape.channels, shape.kernel_size)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith(("running_mean", "running_var")) or tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module
