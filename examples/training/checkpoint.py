"""Checkpoints: everything that the rest of a training depends on, in one file.

The file holds tensors and plain Python values only, so that it loads with `weights_only=True`, and
the weights stand under the names that timm and the official repository use (`state_dict`,
`state_dict_ema`), so that `cotnet-ext` and `create_model(checkpoint=...)` read it as it is.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotnet_ext._files import replacing
from cotnet_ext.cli.command import UsageError

LAST, BEST = "last.pt", "best.pt"
NEEDED = {"state_dict", "random_states", "options", "epoch", "history"}  # to go on


def save(content: dict[str, Any], path: Path) -> None:
    """Writes a file that is whole at every moment: the old one until the new one is complete."""
    with replacing(path) as unfinished:
        torch.save(content, unfinished)


def load(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UsageError(f"--resume: cannot read {str(path)!r}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises all kinds
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--resume: {str(path)!r} may be damaged ({first}); move it away to begin anew"
        ) from None
    if not isinstance(content, dict) or not content.keys() >= NEEDED:
        raise UsageError(f"--resume: {str(path)!r} is no checkpoint of a training")
    return content


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all random generators of this process."""
    kind, words, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, numpy_words, *rest = state["numpy"]
    np.random.set_state((kind, numpy_words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed(number: int) -> None:
    """Seeds all random generators of this process."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
