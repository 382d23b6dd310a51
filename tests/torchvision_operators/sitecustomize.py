"""Lets torchvision import where its compiled operators do not load.

Some package indexes have no torchvision that was compiled for the PyTorch of the tests. Its Python
code, all that timm needs of it, still works once the operators that it asks for at import are
declared. Python runs this file at its start when the folder is in PYTHONPATH: so in subprocesses
of the tests; `tests/conftest.py` calls `declare` itself. A torchvision that loads stays as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

OPERATORS = ("nms", "qnms")  # those that `torchvision/_meta_registrations.py` takes for granted
_kept = []  # a library that is collected takes its operators with it


def declare() -> None:
    """Declares `OPERATORS` if those of the installed torchvision do not load."""
    import torch

    if _kept or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _loads(spec):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _loads(spec) -> bool:
    """Whether the compiled operators of torchvision can be loaded."""
    from pathlib import Path

    import torch

    for name in ("_C.so", "_C_stable.so"):
        path = Path(spec.origin).with_name(name)
        if path.exists():
            try:
                torch.ops.load_library(str(path))
            except OSError:
                return False
    return hasattr(torch.ops.torchvision, "nms")


class _Declare(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision is imported, no sooner than torch is."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


sys.meta_path.insert(0, _Declare())
