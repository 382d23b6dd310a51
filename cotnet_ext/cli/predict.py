"""`cotnet-ext predict`: the classes of images, and a picture of the attention on them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, UsageError, make_folder, require, whole

if TYPE_CHECKING:
    import torch

    from ..models import CoTNet
    from ..prediction import Prediction, Preparation

DTYPES = ("float32", "float16", "bfloat16", "float64")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of images"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="such as cotnet50")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="FILE",
        help="its weights: .safetensors, .pth, .pth.tar; the number of classes is taken from it",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes: one per line, or JSON (a list, or a dict by index)",
    )
    parser.add_argument(
        "--top-k", type=whole(1), default=5, metavar="K", help="classes shown (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs to read")
    parser.add_argument(
        "--visualize",
        type=Path,
        metavar="OUT",
        help="draw what the contextual layers attend to on the first images (.png, .pdf, .svg ...)",
    )
    parser.add_argument(
        "--layers",
        metavar="NAMES",
        help="layers to draw, such as layer2.3,layer4.* (default: the last of each stage)",
    )
    parser.add_argument(
        "--size",
        type=whole(32, 4096),
        metavar="PIXELS",
        help="side of the images that the network sees (default: that of the model)",
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=16, metavar="N", help="images at once (default: 16)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: a GPU if usable, else cpu)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the network (default: float32)"
    )


def _run(arguments: argparse.Namespace) -> int:
    """Classifies the images; the good ones are shown also where others cannot be read."""
    require("models", "PIL", "rich", "safetensors")
    from ..prediction import ImageError, Preparation, classify, find_images, read_labels

    _check_picture(arguments)
    device = _device(arguments.device)
    try:
        paths = find_images(arguments.images)
    except ImageError as error:
        raise UsageError(str(error)) from None
    model = _load(arguments, device)
    layers = _layers(arguments, model)
    labels = None
    if arguments.labels is not None:
        try:
            labels = read_labels(arguments.labels, model.num_classes)
        except OSError as error:
            raise UsageError(f"--labels: {_reason(error, arguments.labels)}") from None
        except ValueError as error:
            raise UsageError(f"--labels: {error}") from None
    preparation = Preparation.of(model.variant, arguments.size)
    try:
        with _Progress(len(paths)) as progress:
            predictions = list(
                classify(
                    model,
                    preparation,
                    paths,
                    batch_size=arguments.batch_size,
                    top_k=arguments.top_k,
                    done=progress,
                )
            )
    except ArithmeticError as error:
        advice = "try --dtype bfloat16 or float32" if arguments.dtype == "float16" else ""
        raise UsageError("; ".join(filter(None, [str(error), advice]))) from None
    good = [prediction for prediction in predictions if not prediction.error]
    if good:
        _show(arguments, good, labels)
    if good and arguments.visualize is not None:
        _draw(arguments, model, preparation, good, labels, layers)
    errors = [prediction.error for prediction in predictions if prediction.error]
    if errors:
        more = f" (and {len(errors) - 1} more of {len(paths)} images)" if len(errors) > 1 else ""
        raise UsageError(f"{errors[0]}{more}")
    return 0


# ---- Before the work -----------------------------------------------------------------------------


def _check_picture(arguments: argparse.Namespace) -> None:
    """Refuses now what could only fail after all the work."""
    if arguments.visualize is None:
        if arguments.layers is not None:
            raise UsageError("--layers needs --visualize")
        return
    require("demo", "matplotlib")
    from ..prediction.picture import formats

    path, endings = arguments.visualize, formats()
    if path.suffix[1:].lower() not in endings:
        raise UsageError(f"--visualize: {str(path)!r} has to end in one of ." + ", .".join(endings))
    if path.is_dir():
        raise UsageError(f"--visualize: {str(path)!r} is a folder")
    make_folder("--visualize", path.parent)


def _device(name: str | None) -> torch.device:
    import torch

    from .._ops import build_info

    usable = build_info()["cuda"] and torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not build_info()["cuda"]:
            raise UsageError("--device: this build has no CUDA kernels; see cotnet-ext info")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device: {name!r} is not there; PyTorch sees {count} GPU(s)")
    return device


def _load(arguments: argparse.Namespace, device: torch.device) -> CoTNet:
    import torch

    from ..checkpoints import CheckpointError
    from ..models import get_variant
    from ..prediction import load_classifier

    try:
        get_variant(arguments.model)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None
    try:
        model = load_classifier(arguments.model, arguments.checkpoint)
    except OSError as error:
        raise UsageError(f"--checkpoint: {_reason(error, arguments.checkpoint)}") from None
    except CheckpointError as error:
        raise UsageError(f"--checkpoint: {error}") from None
    return model.to(device, getattr(torch, arguments.dtype))


def _layers(arguments: argparse.Namespace, model: CoTNet) -> list[str]:
    from ..prediction.attention import choose_layers, default_layers

    if arguments.layers is None:
        return default_layers(model)
    wanted = [name.strip() for name in arguments.layers.split(",") if name.strip()]
    try:
        layers = choose_layers(model, wanted)
    except ValueError as error:
        raise UsageError(f"--layers: {error}") from None
    if not layers:
        raise UsageError("--layers: expected names separated by commas")
    return layers


def _reason(error: OSError, path: Path) -> str:
    return f"cannot read {str(path)!r}: {error.strerror or error}"


# ---- Results -------------------------------------------------------------------------------------


class _Progress:
    """A bar on stderr, where that is a terminal; called with the number of images done."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
        self.bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("images", total=total)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, count: int) -> None:
        self.bar.advance(self.task, count)


def _label(labels: list[str] | None, index: int) -> str:
    return f"class {index}" if labels is None else labels[index]


def _show(
    arguments: argparse.Namespace, predictions: list[Prediction], labels: list[str] | None
) -> None:
    if arguments.json:
        print(json.dumps(_as_json(arguments, predictions, labels), indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for prediction in predictions:
        ranks = zip(prediction.classes, prediction.probabilities, strict=True)
        for rank, (index, probability) in enumerate(ranks, 1):
            table.add_row(
                Text(str(prediction.path) if rank == 1 else ""),
                str(rank),
                Text(_label(labels, index)),
                f"{probability:.2%}",
                end_section=rank == len(prediction.classes),
            )
    console = Console(file=sys.stdout)
    if not console.is_terminal:  # nothing is folded in files and pipes
        wanted = Measurement.get(console, console.options.update(max_width=10_000), table)
        console = Console(file=sys.stdout, width=max(80, wanted.maximum))
    console.print(table)


def _as_json(
    arguments: argparse.Namespace, predictions: list[Prediction], labels: list[str] | None
) -> dict[str, object]:
    return {
        "model": arguments.model,
        "checkpoint": str(arguments.checkpoint),
        "images": [
            {
                "image": str(prediction.path),
                "predictions": [
                    {"class": index, "label": _label(labels, index), "probability": probability}
                    for index, probability in zip(
                        prediction.classes, prediction.probabilities, strict=True
                    )
                ],
            }
            for prediction in predictions
        ],
    }


def _draw(
    arguments: argparse.Namespace,
    model: CoTNet,
    preparation: Preparation,
    predictions: list[Prediction],
    labels: list[str] | None,
    layers: list[str],
) -> None:
    import torch

    from ..prediction import attention_of
    from ..prediction.picture import MOST_IMAGES, Shown, draw

    predictions = predictions[:MOST_IMAGES]
    images = torch.stack([preparation.read(prediction.path) for prediction in predictions])
    like = model.fc.weight
    weights = attention_of(model, images.to(like.device, like.dtype), layers)
    rows = []
    for place, prediction in enumerate(predictions):
        ranks = zip(prediction.classes, prediction.probabilities, strict=True)
        rows.append(
            Shown(
                prediction.path.name,
                preparation.restore(images[place]),
                [(_label(labels, index), probability) for index, probability in ranks],
                {name: of_layer[place] for name, of_layer in weights.items()},
            )
        )
    try:
        draw(arguments.visualize, f"{model.variant.title}: where it looks", rows)
    except OSError as error:
        raise UsageError(
            f"--visualize: cannot write {str(arguments.visualize)!r}: {error.strerror or error}"
        ) from None
    print(f"wrote {arguments.visualize}", file=sys.stderr)


COMMAND = Command(
    "predict",
    "classify images with a trained network, and draw what its contextual layers attend to",
    _add_arguments,
    _run,
)
