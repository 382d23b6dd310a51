"""Which classes are looked for, and whether a class is one that ours can take the place of."""

from __future__ import annotations

import torch
from torch import fx, nn

from .. import compat, modules

LAYERS = {
    "cotattention": modules.CoTAttention,
    "cotlayer": modules.CotLayer,
    "coxtlayer": modules.CoXtLayer,
}
LOCAL = {
    "localconvolution": modules.LocalConvolution,
    "localconvolutiondilate": compat.LocalConvolutionDilate,
    "localconvolutionmix": compat.LocalConvolutionMix,
    "localconvolutionmixmerge": compat.LocalConvolutionMixMerge,
}
OURS = (*LAYERS.values(), *LOCAL.values())

# A class that defines another attribute of nn.Module than these, or one of these special methods,
# does more than its forward says.
_HARMLESS = ("forward", "extra_repr", "call_super_init", "dump_patches")
_SPECIAL = ("call", "getattr", "getattribute", "setattr", "delattr", "copy", "deepcopy")
_SPECIAL += ("getstate", "setstate", "reduce", "reduce_ex")


class Refusal(Exception):
    """Why a module is left alone."""


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """Our class for a module whose class, or a base class, has a name of the family."""
    names = [c.__name__ for c in type(module).__mro__]
    if isinstance(module, torch.jit.ScriptModule):
        names.append(module.original_name)
    kinds = [(LAYERS | LOCAL).get(name.lower().replace("_", "")) for name in names]
    kind = next((kind for kind in kinds if kind is not None), None)
    children = {name for name, _ in module.named_children()}
    if kind in LAYERS.values() and {"value_embed", "attention_embed"} <= children:
        return modules.CoTAttention  # also where a copy carries the name of the official layer
    return kind


def check_class(module: nn.Module, ours: type[nn.Module]) -> None:
    """Refuses what cannot become an object of our class without losing behaviour."""
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal("it is a TorchScript module; convert before torch.jit.script or trace")
    if isinstance(module, fx.GraphModule):
        raise Refusal("it is a graph of torch.fx; convert before tracing")
    if "forward" in vars(module):
        raise Refusal("its forward was replaced on the object, not in its class")
    for c in _own_classes(module):
        for name in vars(c):
            if _changes_behaviour(name):
                raise Refusal(f"class {c.__name__} overrides {name} of nn.Module")
    try:
        shallow_copy(module).__class__ = ours
    except TypeError as error:  # Python refuses where objects are laid out differently
        raise Refusal(f"its class cannot be changed: {error}") from None


def _own_classes(module: nn.Module) -> list[type]:
    """The classes of a module up to `nn.Module`."""
    return [c for c in type(module).__mro__ if c not in nn.Module.__mro__]


def _changes_behaviour(name: str) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in _SPECIAL
    return name in vars(nn.Module) and name not in _HARMLESS


def lost_methods(module: nn.Module, ours: type[nn.Module]) -> str:
    """A remark on the public methods and properties that ours has not."""
    names = {
        name
        for c in _own_classes(module)
        for name, value in vars(c).items()
        if not name.startswith("_") and not hasattr(ours, name)
        if callable(value) or isinstance(value, (property, classmethod, staticmethod))
    }
    return f"without its {', '.join(sorted(names))}" if names else ""


def shallow_copy(module: nn.Module) -> nn.Module:
    """An object of the same class with the same attributes, made without running its code."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    return copy
