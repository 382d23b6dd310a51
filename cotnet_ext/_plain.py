"""Whether a submodule may be replaced by a computation with its parameters."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why calling `module` may do something else than `kind.forward` says; None if it does not.

    Only then may a layer use the parameters of a submodule in place of calling it. Parametrizations
    change the type; pruning, weight norm and sharding are hooks; some tools replace `forward`.
    """
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return "is under global hooks of modules" if _has_any_global_hook() else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return why_not_plain(module, kind) is None
