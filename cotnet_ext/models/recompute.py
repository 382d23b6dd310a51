"""Gradient checkpointing that leaves the running statistics of BatchNorms as they would be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, input: Tensor) -> Tensor:
    """`module(input)` without keeping what its backward needs, which is computed again there."""
    if torch.compiler.is_compiling():  # the compiler repeats no change of a buffer by itself
        return checkpoint(module, input, use_reentrant=False)
    return checkpoint(
        module,
        input,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(module)),
    )


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorms in training normalise as ever and learn nothing of the batch."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, tracked in before:
        norm.momentum = 0.0
        if tracked is not None:  # counted in a copy: without a number SyncBatchNorm refuses
            norm.num_batches_tracked = tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, tracked in before:
            norm.momentum, norm.num_batches_tracked = momentum, tracked
