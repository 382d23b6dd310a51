"""Layers as `optimize_for_inference` leaves them, against the reference eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cotnet_ext import modules, optimize_for_inference, reference

from .bench_modules import build
from .comparison import SUBJECT, Comparison, Contender, Function, Options
from .harness import measure
from .inputs import Maps
from .networks import compiled_for_inference
from .shapes import Shape

LAYERS = ("CoTAttention", "CotLayer", "CoXtLayer")


def rows(options: Options) -> Iterator[dict]:
    for name in LAYERS:
        for shape in options.shapes():
            for dtype in (torch.bfloat16,) if options.gpu else (torch.float32,):
                yield from measure(_comparison(name, shape, dtype, options), options)


def op_name(layer: str) -> str:
    """The optimised layer in the results."""
    return f"optimised {layer}"


def _comparison(name: str, shape: Shape, dtype: torch.dtype, options: Options) -> Comparison:
    theirs = build(getattr(reference, name), shape, options.device).to(dtype)
    truth = build(getattr(reference, name), shape, options.device).to(dtype)
    ours = build(getattr(modules, name), shape, options.device).to(dtype)
    fast = optimize_for_inference(theirs)

    def contender(provider: str, function: Function, layout: str = "contiguous") -> Contender:
        maps = Maps(shape, dtype, layout, options.device)
        return Contender(provider, function, truth, maps)

    # As inside of an optimised network, whose maps are channels_last; then alone among NCHW maps.
    contenders = [
        contender(SUBJECT, fast, "channels_last"),
        contender(SUBJECT, fast),
        contender("not optimised", ours),
        contender("reference", theirs),
    ]
    if options.compiled and not options.quick:
        compiled = compiled_for_inference(theirs)
        contenders.append(contender("reference, compiled", compiled))
    return Comparison(op_name(name), "eval", shape, contenders, dtype, keep_results=False)
