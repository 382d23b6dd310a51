"""Whole networks: evaluation and training step, against the reference network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from cotnet_ext import optimize_for_inference

from .comparison import SUBJECT, Comparison, Contender, Function, Options
from .harness import measure
from .networks import Images, Network, build, compiled_for_inference, networks

COMPILED = f"{SUBJECT}, compiled"
HALF = f"{SUBJECT}, bfloat16"


def rows(options: Options) -> Iterator[dict]:
    # A call takes as long as hundreds of calls of an operator, so a few of them will do.
    few = dataclasses.replace(options, turn_calls=1, budget_s=5 * options.budget_s)
    fewest = dataclasses.replace(few, budget_s=0.0, min_rounds=min(5, options.min_rounds))
    for network in networks(options):
        yield from measure(_evaluation(network, options), few)
        if network.train_shape is not None:
            yield from measure(_training(network, options), fewest)


def _evaluation(network: Network, options: Options) -> Comparison:
    """On a CPU everything in float32, and ours in bfloat16 beside it; on a GPU all in bfloat16."""
    dtype = torch.bfloat16 if options.gpu else torch.float32
    theirs = build(network.name, options.device, reference=True).eval().to(dtype)
    truth = build(network.name, options.device, reference=True).eval()
    ours = build(network.name, options.device, reference=False).eval().to(dtype)
    fast = optimize_for_inference(ours)
    shape = network.eval_shape

    def contender(
        provider: str, function: Function, layout: str = "contiguous", dtype: torch.dtype = dtype
    ) -> Contender:
        images = Images(shape, dtype, layout, options.device)
        return Contender(provider, function, truth, images)

    contenders = [
        contender(SUBJECT, fast),
        contender("not optimised", ours),
        contender("reference", theirs),
    ]
    if options.compiled and not options.quick:
        contenders.append(contender(COMPILED, compiled_for_inference(fast)))
        contenders.append(contender("reference, compiled", compiled_for_inference(theirs)))
    if not options.gpu and not options.quick:
        # Converted from the float32 network: no copy of it in bfloat16 has to be kept.
        half = optimize_for_inference(ours, torch.bfloat16)
        contenders.append(contender(HALF, half, dtype=torch.bfloat16))
        if options.compiled:
            compiled = compiled_for_inference(half)
            contenders.append(contender(f"{HALF}, compiled", compiled, dtype=torch.bfloat16))
    return Comparison(network.name, "eval", shape, contenders, dtype, keep_results=False)


def _training(network: Network, options: Options) -> Comparison:
    dtype = torch.bfloat16 if options.gpu else torch.float32
    theirs = build(network.name, options.device, reference=True).to(dtype)
    truth = build(network.name, options.device, reference=True)
    ours = build(network.name, options.device, reference=False).to(dtype)
    images = Images(network.train_shape, dtype, "contiguous", options.device)
    contenders = [
        Contender(SUBJECT, ours, truth, images),
        Contender("reference", theirs, truth, images),
    ]
    if options.compiled and not options.quick:
        compiled = torch.compile(theirs, fullgraph=True, dynamic=False)
        contenders.append(Contender("reference, compiled", compiled, truth, images))
    return Comparison(
        network.name, "train step", network.train_shape, contenders, dtype, keep_results=False
    )
