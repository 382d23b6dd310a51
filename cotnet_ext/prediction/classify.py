"""Classes of image files, batch by batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoints
from ..models import CoTNet, create_model
from ..models.blocks import BlurPool
from ..models.weights import naming_the_owner
from .images import ImageError, Preparation


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first, or why there are none.

    Attributes:
        path: the file.
        classes: indices of the outputs.
        probabilities: their softmax.
        error: why the file could not be read; then the others are empty.
    """

    path: Path
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def load_classifier(name: str, checkpoint: str | os.PathLike[str]) -> CoTNet:
    """The network of a file, in evaluation mode, with as many classes as the file has.

    Raises:
        OSError, CheckpointError, ValueError: the file cannot be read, has no classifier or is for
            images of other than 3 channels, or does not fit; the name is unknown.
    """
    weights = checkpoints.read(checkpoint)
    with torch.device("meta"):
        expected = create_model(name)
    cfg = expected.pretrained_cfg
    classifier = weights.tensors.get(f"{cfg['classifier']}.weight")
    first = weights.tensors.get(f"{cfg['first_conv']}.weight")
    if classifier is None and first is not None:
        raise checkpoints.CheckpointError(f"{str(checkpoint)!r} has no classifier")
    if first is not None and first.dim() == 4 and first.shape[1] != 3:
        raise checkpoints.CheckpointError(
            f"{str(checkpoint)!r} is for images of {first.shape[1]} channels, expected 3"
        )
    classes = 1000 if classifier is None or not len(classifier) else len(classifier)
    with torch.device("meta"):  # which saves the time to draw random weights
        model = create_model(name, num_classes=classes)
    model.to_empty(device="cpu")
    for part in model.modules():
        if isinstance(part, BlurPool):
            part.reset_parameters()
    with naming_the_owner(name):
        tensors, _ = checkpoints.fit(weights, model)
    model.load_state_dict(tensors)
    return model.eval()


def read_labels(path: str | os.PathLike[str], count: int) -> list[str]:
    """The names of `count` classes: one per line, or in JSON a list, or a dict by index.

    Entries of a dict may be lists that end in the name, as in the class index of Keras.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, no such JSON, or has another number of names.
    """
    text = Path(path).read_bytes()
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is no text in UTF-8") from None
    if decoded.lstrip()[:1] in ("{", "["):
        labels = _labels_of_json(path, decoded)
    else:
        labels = [line.strip() for line in decoded.rstrip().splitlines()]
    if len(labels) != count:
        raise ValueError(f"{str(path)!r} has {len(labels)} names, expected {count}")
    return labels


def _labels_of_json(path: str | os.PathLike[str], text: str) -> list[str]:
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            values = [values[str(index)] for index in range(len(values))]
    except (ValueError, KeyError):
        raise ValueError(f"{str(path)!r} is no JSON list of names, or dict by index") from None
    return [str(value[-1] if isinstance(value, list) and value else value) for value in values]


def classify(
    model: CoTNet,
    preparation: Preparation,
    paths: Sequence[Path],
    *,
    batch_size: int = 16,
    top_k: int = 5,
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[Prediction]:
    """The predictions for the files, in their order; a file that cannot be read has an `error`.

    Args:
        model: in evaluation mode; the images go to its device and dtype.
        preparation: of the images.
        paths: the files.
        batch_size: images per pass.
        top_k: classes per image.
        done: called with the number of images of every finished batch.

    Raises:
        ArithmeticError: a result is not finite.
    """
    like = model.fc.weight
    for batch in _read_ahead(preparation, paths, batch_size):
        images = [image for _, image in batch if isinstance(image, Tensor)]
        ranks: Iterator[tuple[Tensor, Tensor]] = iter(())
        if images:
            with torch.inference_mode():
                logits = model(torch.stack(images).to(like.device, like.dtype))
            if not logits.isfinite().all():
                raise ArithmeticError(
                    f"the network gives numbers that are not finite, {like.dtype}"
                )
            wide = torch.promote_types(logits.dtype, torch.float32)
            best = logits.softmax(1, dtype=wide).cpu().topk(min(top_k, logits.shape[1]))
            ranks = zip(best.indices, best.values, strict=True)
        for path, image in batch:
            if isinstance(image, ImageError):
                yield Prediction(path, error=str(image))
            else:
                classes, probabilities = next(ranks)
                yield Prediction(path, tuple(classes.tolist()), tuple(probabilities.tolist()))
        done(len(batch))


def _read_ahead(
    preparation: Preparation, paths: Sequence[Path], batch_size: int
) -> Iterator[list[tuple[Path, Tensor | ImageError]]]:
    """Batches of prepared images, the next of which is read while the current one is used."""

    def read(path: Path) -> Tensor | ImageError:
        try:
            return preparation.read(path)
        except ImageError as error:
            return error

    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1, batch_size)) as pool:
        waiting: list[list[Future]] = [[pool.submit(read, path) for path in batches[0]]]
        for index, batch in enumerate(batches):
            if index + 1 < len(batches):
                waiting.append([pool.submit(read, path) for path in batches[index + 1]])
            images = [future.result() for future in waiting.pop(0)]
            yield list(zip(batch, images, strict=True))
