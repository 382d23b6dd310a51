"""The layers as other projects define them: the same names and sub-modules in other files."""

from __future__ import annotations

import inspect
import sys
import types

from cotnet_ext import reference


def package(name: str) -> types.ModuleType:
    """The classes of `reference`, defined once more in a module of this name."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec(compile(inspect.getsource(reference), f"{name}.py", "exec"), vars(module))
    return sys.modules[name]


# As after `from models.cotnet import ...` in a checkout of the official repository.
official = package("foreign_official")
