"""Weights in files: those of the official code and of its relatives are read, safetensors written.

No code of a file is ever run: PyTorch files are read with `weights_only`, and what those of the
official code hold beside tensors (a `yacs` configuration, `argparse` options, NumPy numbers)
becomes plain data. What needs more than that is refused.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import replacing

__all__ = ["Checkpoint", "CheckpointError", "fit", "load_into", "read", "write"]

_logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]


class CheckpointError(ValueError):
    """The file cannot be used; the message says which, why, and what to do.

    Attributes:
        checkpoint: the weights, where they could be read but do not fit.
    """

    def __init__(self, message: str, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        path: the file.
        tensors: by the names of the parameters, without prefixes of wrappers.
        part: what was taken of the file, such as `state_dict_ema`; `""` if it holds nothing else.
    """

    path: Path
    tensors: dict[str, Tensor]
    part: str = ""

    @property
    def averaged(self) -> bool:
        """Whether these are a moving average of the weights."""
        return "ema" in self.part


# ---- Reading -------------------------------------------------------------------------------------

# Where the weights lie in files of timm, the official code, Lightning, mmengine and others; the
# moving average first, which is what was evaluated and published.
EMA_PARTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PARTS = ("state_dict", "model_state_dict", "model", "network", "net", "weights", "module")
# What wrappers put before the names: data parallel, torch.compile, averaged and Lightning modules.
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.")


def read(path: Path_, *, ema: bool = True) -> Checkpoint:
    """Reads the weights of a `.safetensors`, `.pth`, `.pth.tar` or `.pt` file, on the CPU.

    Args:
        path: the file; its contents decide how it is read, not its name.
        ema: take the moving average of the weights where the file has one.

    Raises:
        OSError: no such file, or it cannot be read.
        CheckpointError: it holds no weights, is damaged, or needs more than `weights_only` reads.
    """
    path = Path(path)
    contents = _contents(path)
    parts, tensors = _unwrap(contents, (*EMA_PARTS, *PARTS) if ema else PARTS)
    if tensors is None:
        keys = ", ".join(map(repr, list(contents)[:6])) if isinstance(contents, Mapping) else ""
        found = f"a dict of {keys}" if keys else f"a {type(contents).__name__}"
        raise CheckpointError(f"{_name(path)} holds no weights, but {found}")
    return Checkpoint(path, _without_prefixes(tensors), ".".join(parts))


def _contents(path: Path) -> Any:
    with open(path, "rb") as file:  # raises what users of files expect
        start = file.read(64)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _read_torch(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    text = start.lstrip().lower()
    kind = next((kind for sign, kind in SIGNS.items() if text.startswith(sign)), "no checkpoint")
    raise CheckpointError(
        f"{_name(path)} is {kind if start else 'empty'}; expected a PyTorch file (.pth, .pth.tar, "
        ".pt) or a .safetensors file"
    )


SIGNS = {
    b"<!doctype": "a web page and not the file that was to be downloaded",
    b"<html": "a web page and not the file that was to be downloaded",
    b"\x1f\x8b": "compressed with gzip and has to be unpacked",
    b"version https://git-lfs": "a pointer of Git LFS, whose file `git lfs pull` fetches",
}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{_name(path)} is damaged: {error}") from None


def _read_torch(path: Path) -> Any:
    stand_ins = [(kind, name) for kind, names in STAND_INS.items() for name in names]
    try:
        # Remarks on how the file was pickled are nothing that its reader can change.
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of half a dozen types, by the place where the file breaks
        text = str(error)
    needed = re.search(r"\bGLOBAL (\S+)", text)
    if needed:
        raise CheckpointError(
            f"{_name(path)} needs {needed[1]} of Python to be opened, which could run any code and "
            "is not done here. If you trust the file, save its weights alone: "
            "c = torch.load(FILE, weights_only=False), then torch.save(c['state_dict'], NEW), or "
            "torch.save(c.state_dict(), NEW) if c is a model"
        )
    reason = text.strip().splitlines()[-1 if "WeightsUnpickler" in text else 0] if text else ""
    raise CheckpointError(
        f"{_name(path)} is damaged or was not written by torch.save"
        + (f": {reason[:120]}" if reason else "")
    )


class _PlainDict:
    """Takes the place of classes of settings in a file: a dict with what they hold."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _Nothing:
    """Takes the place of numbers and paths of other libraries in a file."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Names in files to what is made instead; nothing of these libraries is imported.
STAND_INS = {
    _PlainDict: ("yacs.config.CfgNode", "argparse.Namespace", "types.SimpleNamespace"),
    _Nothing: (
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
    ),
}


def _unwrap(
    contents: Any, names: tuple[str, ...], around: tuple[Any, ...] = ()
) -> tuple[tuple[str, ...], dict[str, Tensor] | None]:
    """The tensors within nested dicts, and the keys that lead there.

    `around` are the dicts that hold this one; a file may well hold a dict that holds itself.
    """
    if not isinstance(contents, Mapping) or any(contents is outer for outer in around):
        return (), None
    for name in names:
        parts, tensors = _unwrap(contents.get(name), names, (*around, contents))
        if tensors is not None:
            return (name, *parts), tensors
    tensors = {
        key: value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    return (), tensors if any("." in key for key in tensors) else None


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {key: value for key, value in tensors.items() if key != "n_averaged"}
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


# ---- Into a model --------------------------------------------------------------------------------


def load_into(model: nn.Module, path: Path_, *, ema: bool = True) -> Checkpoint:
    """Loads the weights of a file into a network of `cotnet_ext.models`.

    Everything must fit, but for three things, each said in one line through `logging`: a classifier
    for another number of classes, or none, is left as it is in the model; the first convolution is
    adapted to other image channels; parts that the model does not have because it was built for
    maps only are not needed.

    Raises:
        OSError, CheckpointError: as `read`; and if names or shapes differ, with the first that is
            missing, the first that is unexpected and the first of another shape.
    """
    checkpoint = read(path, ema=ema)
    tensors, remarks = fit(checkpoint, model)
    model.load_state_dict(tensors)
    for remark in remarks:
        _logger.warning("%s", remark)
    return checkpoint


def fit(checkpoint: Checkpoint, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The complete `state_dict` for the model, and a sentence for each thing that was changed."""
    expected = model.state_dict()
    tensors, remarks = dict(checkpoint.tensors), []
    cfg = getattr(model, "pretrained_cfg", None) or {}
    for adapt in (_adapt_classifier, _adapt_first_conv, _drop_unbuilt_stages):
        remark = adapt(tensors, expected, cfg)
        if remark:
            remarks.append(f"{_name(checkpoint.path)} {remark}")
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):  # some tools leave it out, and it is not used
            tensors.setdefault(key, torch.zeros_like(value))
    differences = list(_differences(tensors, expected))
    if differences:
        name = cfg.get("architecture") or type(model).__name__
        raise CheckpointError(
            f"{_name(checkpoint.path)} does not fit {name}: " + "; ".join(differences), checkpoint
        )
    return tensors, remarks


def _differences(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[str]:
    groups = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "of another shape": [
            key for key in tensors if key in expected and tensors[key].shape != expected[key].shape
        ],
    }
    for what, keys in groups.items():
        if not keys:
            continue
        first = repr(keys[0])
        if what == "of another shape":
            first += f" is {list(tensors[keys[0]].shape)}, not {list(expected[keys[0]].shape)}"
        yield f"{len(keys)} {what}, first {first}"


def _adapt_classifier(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], cfg: Mapping[str, Any]
) -> str | None:
    name = cfg.get("classifier", "fc")
    key = f"{name}.weight"
    here, there = expected.get(key), tensors.get(key)
    if here is not None and there is not None and here.dim() != there.dim():
        return None  # no classifier: reported as of another shape
    if here is None or there is None or here.shape[0] != there.shape[0]:
        dropped = [tensors.pop(f"{name}.{part}", None) for part in ("weight", "bias")]
        if here is None:
            return None  # the model has no classifier
        if there is None and any(part is not None for part in dropped):
            return None  # half a classifier: reported as missing
        for part in ("weight", "bias"):
            tensors[f"{name}.{part}"] = expected[f"{name}.{part}"]
        has = "no classifier" if there is None else f"a classifier for {there.shape[0]} classes"
        return f"has {has}, so that for {here.shape[0]} starts random"
    return None


def _adapt_first_conv(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], cfg: Mapping[str, Any]
) -> str | None:
    """Sums or repeats the channels of the first convolution, as timm does."""
    key = f"{cfg.get('first_conv', 'conv1')}.weight"
    here, there = expected.get(key), tensors.get(key)
    if here is None or there is None or here.shape == there.shape or there.dim() != 4:
        return None
    count, channels = here.shape[1], there.shape[1]
    if channels != 3 or here.shape != (there.shape[0], count, *there.shape[2:]):
        return None
    if count == 1:
        tensors[key] = there.float().sum(1, keepdim=True).to(there.dtype)
    else:
        repeated = there.repeat(1, math.ceil(count / channels), 1, 1)[:, :count]
        tensors[key] = repeated * (channels / count)
    return f"is for images of {channels} channels; its first convolution was adapted to {count}"


def _drop_unbuilt_stages(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], cfg: Mapping[str, Any]
) -> None:
    """Removes the stages that a network for maps was built without."""
    last = max((int(key[5]) for key in expected if re.match(r"layer[1-4]\.", key)), default=0)
    classifier = f"{cfg.get('classifier', 'fc')}."
    if last == 4 or any(key.startswith(classifier) for key in expected):
        return
    for key in [key for key in tensors if re.match(r"layer[1-4]\.", key) and int(key[5]) > last]:
        del tensors[key]


# ---- Writing -------------------------------------------------------------------------------------


def write(
    tensors: Mapping[str, Tensor], path: Path_, metadata: dict[str, str] | None = None
) -> None:
    """Writes a `.safetensors` file; an old one of that name stays whole until the new one is.

    Raises:
        OSError: the file cannot be written.
    """
    safetensors = _safetensors()
    # Tensors of their own each: safetensors takes none that share memory.
    own = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    with replacing(path) as unfinished:
        try:
            safetensors.torch.save_file(own, unfinished, {"format": "pt", **(metadata or {})})
        except safetensors.SafetensorError as error:  # such as a disk without space
            raise OSError(str(error)) from None


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            'needs safetensors; install with: pip install "cotnet_ext[models]"'
        ) from None
    return safetensors


def _name(path: Path) -> str:
    return repr(str(path))
