"""`convert`: the layers of this package in place of their originals, in any model.

An original is recognised in three steps: by the name of its class (or of a base class), by its
sub-modules, which must be those that our class makes for the same channels and kernel size, and by
its `forward`, which is run beside ours on a small map. What fails one of them is left alone, and
the report says why.

A layer is not built anew: its object gets our class, as `torch.nn.utils.parametrize` and FSDP do.
So parameters, buffers, sub-modules, hooks and their handles, modes, dtypes, devices and attributes
stay, and so does everything that refers to the object: optimizers, wrappers, closures, and other
places of the model that share it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .. import compat
from .family import LOCAL, OURS, Refusal, check_class, counterpart, lost_methods
from .numbers import check_forward, local_twin
from .structure import layer_twin

__all__ = ["Finding", "convert"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One module of the family that `convert` met.

    Attributes:
        path: its name in the model, `""` for the model itself.
        original: the class that it had, with the module that defines it.
        replacement: the class that it has now, or None where it was left alone.
        remark: why it was left alone, or what to know about the swap; may be empty.
    """

    path: str
    original: str
    replacement: str | None
    remark: str = ""

    def __str__(self) -> str:
        where = self.path or "the model itself"
        if self.replacement is None:
            return f"{where}: {self.original} left alone: {self.remark}"
        remark = f" ({self.remark})" if self.remark else ""
        return f"{where}: {self.original} -> {self.replacement}{remark}"


def convert(
    model: nn.Module, *, dry_run: bool = False, report: list[Finding] | None = None
) -> nn.Module:
    """Swaps the original layers in a model for those of this package, in place.

    Looked for are `CoTAttention` of External-Attention-pytorch, `CotLayer`, `CoXtLayer`, `CoTLayer`
    and `LocalConvolution` (also `Dilate`, `Mix` and `MixMerge`) of JDAI-CV/CoTNet, and those of
    `cotnet_ext.reference`, wherever a copy of their class was defined. One is swapped when

    * its class, or a base class, has such a name (upper and lower case are the same);
    * it has the sub-modules of our class and no others, with convolutions of the same geometry.
      Normalisations and activations may be of another kind, and convolutions may be parametrized
      or prepared for quantisation: they are kept and called as they are;
    * its `forward` takes the same arguments and gives the numbers of ours, in training and in
      evaluation, on a small map with fresh sub-modules; and its class changes nothing else of
      `nn.Module`. The random state, the parameters and the statistics are not touched by that. One
      that cannot even begin on the CPU (it needs CuPy, say) is swapped, with a remark.

    Everything else is kept: the very parameters and buffers, requires_grad, dtypes, devices,
    training mode, hooks, attributes, names and `state_dict` keys, and the identity of each module.
    Layers of this package are left as they are, so converting twice changes nothing. Convert before
    `torch.jit.script` and tracing, after which there are no layers left to find.

    Args:
        model: any module; it may itself be a layer to swap.
        dry_run: only look for what would be swapped.
        report: a list to which a `Finding` is added for each module of the family: swapped, or
            left alone and why. The same lines are logged by `cotnet_ext.conversion`, at level INFO
            for what is swapped and WARNING for what is left alone.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module, `dry_run` no bool or `report` no list.
    """
    _check_arguments(model, dry_run, report)
    # All are judged before the first is changed: the layers know their local convolutions.
    verdicts = list(_judge(model))
    for path, module, replacement, remark in verdicts:
        name = None if replacement is None else _public_name(type(replacement))
        finding = Finding(path, _class_name(module), name, remark)
        if replacement is not None and not dry_run:
            _become(module, replacement)
        _LOG.log(logging.WARNING if replacement is None else logging.INFO, "%s", finding)
        if report is not None:
            report.append(finding)
    return model


def _check_arguments(model: object, dry_run: object, report: object) -> None:
    if not isinstance(model, nn.Module):
        hint = (
            "; a checkpoint that holds a whole model usually has it under 'model' or 'ema'"
            if isinstance(model, dict)
            else ""
        )
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    if not isinstance(dry_run, bool):
        raise TypeError(f"dry_run must be a bool, got {dry_run!r}")
    if report is not None and not isinstance(report, list):
        raise TypeError(f"report must be a list to add to, got {type(report).__name__}")


def _judge(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None, str]]:
    """Path, module, our twin of it (None where it stays) and a remark, for all of the family."""
    known: dict[object, str | Refusal] = {}
    for path, module in model.named_modules():
        ours = None if isinstance(module, OURS) else counterpart(module)
        if ours is None:
            continue
        try:
            check_class(module, ours)
            if ours in LOCAL.values():
                twin, remark = local_twin(module, ours)
            else:
                twin = layer_twin(module, ours)
                remark = check_forward(module, twin, known)
        except Refusal as refusal:
            yield path, module, None, str(refusal)
        else:
            yield path, module, twin, remark or lost_methods(module, ours)


def _become(module: nn.Module, twin: nn.Module) -> None:
    """Gives `module` the class of `twin` and its plain attributes, which copies may lack."""
    plain = {k: v for k, v in vars(twin).items() if not k.startswith("_") and k != "training"}
    module.__dict__.update(plain)
    module.__class__ = type(twin)


def _class_name(module: nn.Module) -> str:
    c = type(module)
    return f"{c.__module__}.{c.__qualname__}"


def _public_name(ours: type[nn.Module]) -> str:
    return f"cotnet_ext.{'compat.' if ours.__module__ == compat.__name__ else ''}{ours.__name__}"
