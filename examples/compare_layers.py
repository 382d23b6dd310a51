"""Trains networks of each layer on the digits, fused and reference, and draws their curves.

    python examples/compare_layers.py --picture curves.svg

Fused and reference layers start from the same seed and see the same batches, so they differ by
rounding alone, which training amplifies. What is noise is shown by the fused layers with another
seed. The exit code is 1 if the layers differ by more than that.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from training.distributed import World
from training.main import train
from training.options import LAYERS, Options, parse

CONFIG = Path(__file__).with_name("configs") / "digits.yaml"
RUNS = {
    "reference": {"reference": True},
    "fused": {},
    "another seed": {"seed": Options().seed + 1},
}
STYLES = {
    "reference": {"color": "#30638e", "lw": 5, "alpha": 0.45},
    "fused": {"color": "#d1495b", "lw": 1.4, "marker": "o", "ms": 3},
    "another seed": {"color": "#8a97a3", "lw": 1, "ls": "--"},
}


def compare(
    epochs: int | None, width: int | None, threads: int
) -> dict[str, dict[str, list[dict]]]:
    """The rows of every training, by layer and kind."""
    torch.set_num_threads(threads)
    options = parse(["--config", str(CONFIG), "--no-tensorboard"])
    epochs, width = epochs or options.epochs, width or options.width
    warmup = min(options.warmup_epochs, epochs - 1)
    options = dataclasses.replace(options, epochs=epochs, width=width, warmup_epochs=warmup)
    curves = {}
    for layer in LAYERS:
        curves[layer] = {}
        for kind, changes in RUNS.items():
            with tempfile.TemporaryDirectory() as out:
                changed = dataclasses.replace(options, out=out, layer=layer, **changes)
                curves[layer][kind] = train(changed, World())
    return curves


def distance(first: list[dict], second: list[dict]) -> float:
    """The largest difference of two curves of the mean loss."""
    pairs = zip(first, second, strict=True)
    return max(abs(one["loss"] - other["loss"]) for one, other in pairs)


def seconds(rows: list[dict]) -> float:
    """The median time of an epoch, without its evaluation."""
    times = sorted(row["seconds"] for row in rows)
    return times[len(times) // 2]


def summarise(curves: dict[str, dict[str, list[dict]]]) -> bool:
    """Prints a table, and says whether fused and reference agree within the noise."""
    table = Table("layer", "accuracy", "reference", "loss differs", "by seed", "epochs/s", "speed")
    agree = True
    for layer, runs in curves.items():
        fused, plain, other = (runs[kind] for kind in ("fused", "reference", "another seed"))
        apart, noise = distance(fused, plain), distance(fused, other)
        agree &= apart <= noise
        table.add_row(
            layer,
            f"{fused[-1]['top1']:.2f} %",
            f"{plain[-1]['top1']:.2f} %",
            f"{apart:.1e}",
            f"{noise:.1e}",
            f"{1 / seconds(fused):.2f}",
            f"{seconds(plain) / seconds(fused):.2f}x",
        )
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
    return agree


def draw(path: Path, curves: dict[str, dict[str, list[dict]]]) -> None:
    """Loss above, held-out errors below, one column per layer."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and the same picture has the same bytes.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cotnet_ext"})
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, sharey="row")
    for column, (layer, runs) in zip(axes.T, curves.items(), strict=True):
        column[0].set_title(layer)
        for kind, rows in runs.items():
            epochs = [row["epoch"] for row in rows]
            column[0].plot(epochs, [row["loss"] for row in rows], label=kind, **STYLES[kind])
            errors = [max(100 - row["top1"], 0.1) for row in rows]  # a logarithm knows no 0
            column[1].plot(epochs, errors, **STYLES[kind])
        column[1].set(xlabel="epoch", yscale="log")
        for axis in column:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("errors among held-out digits, %")
    axes[0, -1].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="default: as in configs/digits.yaml")
    parser.add_argument("--width", type=int, help="channels, default: as there")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="file to draw the curves into")
    options = parser.parse_args()
    curves = compare(options.epochs, options.width, options.threads)
    if options.picture:
        draw(options.picture, curves)
    return 0 if summarise(curves) else 1


if __name__ == "__main__":
    raise SystemExit(main())
