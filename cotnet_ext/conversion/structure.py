"""Whether a module has the sub-modules of one of our layers."""

from __future__ import annotations

import torch
from torch import nn

from .. import modules
from .family import Refusal

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
_CONVOLUTION += ("groups", "padding_mode")


def layer_twin(module: nn.Module, ours: type[nn.Module]) -> nn.Module:
    """Our layer with the sizes of `module` on the meta device; refuses where they differ."""
    own = [name for name, t in (module._parameters | module._buffers).items() if t is not None]
    if own:
        raise Refusal(f"it has {own[0]}, which {ours.__name__} has not")
    dim, kernel_size = _sizes(module, ours)
    try:
        with torch.device("meta"):
            twin = ours(dim, kernel_size)
    except ValueError as error:
        raise Refusal(str(error)) from None
    _compare_children(twin, module, ours.__name__)
    return twin


def _sizes(module: nn.Module, ours: type[nn.Module]) -> tuple[int, int]:
    """Channels and kernel size, from the convolution that every layer of the family begins with."""
    key_embed = dict(module.named_children()).get("key_embed")
    if key_embed is None:
        raise Refusal(f"it has no key_embed, which {ours.__name__} has")
    first = key_embed[0] if isinstance(key_embed, nn.Sequential) and len(key_embed) else key_embed
    dim, kernel = getattr(first, "out_channels", None), getattr(first, "kernel_size", None)
    if not isinstance(dim, int) or not isinstance(kernel, tuple):
        raise Refusal("key_embed does not begin with a Conv2d")
    if len(kernel) != 2 or kernel[0] != kernel[1]:
        raise Refusal(f"key_embed[0] has kernel_size={kernel}, expected a square one of a Conv2d")
    return dim, kernel[0]


def _compare_children(expected: nn.Module, found: nn.Module, owner: str) -> None:
    """Refuses unless `found` has the children of `expected`, all alike."""
    theirs = dict(found.named_children())
    for name, wanted in expected.named_children():
        if name not in theirs:
            raise Refusal(f"it has no {name}, which {owner} has")
        child = theirs.pop(name)
        if isinstance(wanted, nn.Sequential):
            _compare_sequence(wanted, child, name)
        else:
            _compare_part(wanted, child, name, None)
    if theirs:
        raise Refusal(f"it has {next(iter(theirs))}, which {owner} has not")


def _compare_sequence(expected: nn.Sequential, found: nn.Module, name: str) -> None:
    if not isinstance(found, nn.Sequential) or len(found) != len(expected):
        size = f" of {len(found)}" if isinstance(found, nn.Sequential) else ""
        raise Refusal(
            f"{name} is a {type(found).__name__}{size}, expected a Sequential of {len(expected)}"
        )
    followers = [*list(found)[1:], None]
    for index, parts in enumerate(zip(expected, found, followers, strict=True)):
        wanted, part, follower = parts
        _compare_part(wanted, part, f"{name}[{index}]", follower)


def _compare_part(
    expected: nn.Module, found: nn.Module, name: str, follower: nn.Module | None
) -> None:
    """Refuses unless `found` can take the place of `expected` and comes before `follower`."""
    if isinstance(expected, nn.Conv2d):
        _compare_convolution(expected, found, name, follower)
    elif isinstance(expected, (nn.BatchNorm2d, nn.GroupNorm)):
        _compare_norm(expected, found, name)
    elif isinstance(expected, modules.LocalConvolution):
        _compare_local(expected, found, name)
    elif any(True for _ in found.parameters()) or any(True for _ in found.buffers()):
        raise Refusal(
            f"{name} is a {type(found).__name__}, expected an activation without parameters"
        )


def _compare_convolution(
    expected: nn.Conv2d, found: nn.Module, name: str, follower: nn.Module | None
) -> None:
    if not all(hasattr(found, attribute) for attribute in _CONVOLUTION):
        raise Refusal(f"{name} is a {type(found).__name__}, expected a Conv2d")
    for attribute in _CONVOLUTION:
        wanted, value = getattr(expected, attribute), getattr(found, attribute)
        if attribute == "padding" and value == "same":
            value = expected.padding  # the same thing, as the kernel is odd and the stride 1
        if value != wanted:
            raise Refusal(f"{name} has {attribute}={value}, expected {wanted}")
    bias = found.bias() if callable(found.bias) else found.bias  # a method of quantised ones
    # A normalisation that was folded into the convolution has left its shift there.
    folded = bias is not None and isinstance(follower, nn.Identity)
    if (bias is None) != (expected.bias is None) and not folded:
        state = "no bias" if bias is None else "a bias"
        raise Refusal(f"{name} has {state}, which is not so in the original")


def _compare_norm(expected: nn.Module, found: nn.Module, name: str) -> None:
    grouped = isinstance(expected, nn.GroupNorm)
    channels = expected.num_channels if grouped else expected.num_features
    if isinstance(found, nn.Identity):
        return
    value = getattr(found, "num_features", getattr(found, "num_channels", None))
    if value is None:
        value = (getattr(found, "normalized_shape", None) or (None,))[-1]
    if value is None:
        kind = "GroupNorm" if grouped else "BatchNorm2d"
        raise Refusal(f"{name} is a {type(found).__name__}, expected a {kind}")
    if value != channels:
        raise Refusal(f"{name} has {value} channels, expected {channels}")
    if grouped and getattr(found, "num_groups", expected.num_groups) != expected.num_groups:
        raise Refusal(f"{name} has num_groups={found.num_groups}, expected {expected.num_groups}")


def _compare_local(expected: nn.Module, found: nn.Module, name: str) -> None:
    """The window of a local convolution; any other module without parameters is called as it is."""
    if any(True for _ in found.parameters()):
        raise Refusal(f"{name} is a {type(found).__name__}, expected a LocalConvolution")
    if not all(hasattr(found, key) for key in ("kernel_size", "padding", "stride", "dilation")):
        return
    for key in ("kernel_size", "padding", "stride", "dilation"):
        value, wanted = getattr(found, key), getattr(expected, key)
        if value not in (wanted, (wanted, wanted)):
            raise Refusal(f"{name} has {key}={value}, expected {wanted}")
