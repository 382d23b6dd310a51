"""Gradient checkpointing that leaves the running statistics of BatchNorms as they would be."""

from __future__ import annotations

import contextlib
from typing import Any

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
        context_fn=lambda: (contextlib.nullcontext(), _FrozenStatistics(module)),
    )


class _FrozenStatistics:
    """Within it, BatchNorms in training normalise as ever and learn nothing of the batch.

    It is entered again for each backward within a backward, as the layers in training have one.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = nn.modules.batchnorm._BatchNorm
        self.norms = [part for part in module.modules() if isinstance(part, kind)]
        self.before: list[list[tuple[Any, Any]]] = []

    def __enter__(self) -> None:
        self.before.append([(norm.momentum, norm.num_batches_tracked) for norm in self.norms])
        for norm in self.norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                # Counted in a copy: without a number SyncBatchNorm refuses.
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, tracked) in zip(self.norms, self.before.pop(), strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
