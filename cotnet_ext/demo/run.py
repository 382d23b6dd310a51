"""The demo from beginning to end: compare, train, draw, judge."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import modules, reference
from . import digits, photographs, picture
from .compare import CASES, FLOOR, MARGIN, Pair, Row, compare

EPOCHS = 15
QUICK_EPOCHS = 3
LEAST_ACCURACY = 0.97
# Two runs of the same training differ by rounding, which training amplifies: by some 1e-6 at the
# steps of the first epoch, and up to 0.005 in the mean loss of a later epoch and 0.004 in accuracy,
# which is also how far the reference drifts from itself when the number of threads changes.
# Gradients that are wrong by one percent show in the first epoch, as 1e-3.
FIRST_EPOCH_DRIFT = 1e-4
EPOCH_DRIFT = 0.02
ACCURACY_DRIFT = 0.01
PICTURE = "demo.png"
TABLE_WIDTH = 118


@dataclass(frozen=True)
class Options:
    """What the command line says. `epochs` and `threads`: None for the default."""

    out: Path
    seed: int = 0
    epochs: int | None = None
    quick: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Check:
    """One thing the demo claims, whether it holds, and the figures."""

    claim: str
    holds: bool
    figures: str


def run(options: Options, console: Console | None = None) -> bool:
    """Runs the demo, writes the picture into `options.out` and says whether all checks held."""
    console = console or _console()
    if options.threads:
        torch.set_num_threads(options.threads)
    note = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    console.print(f"[bold]cotnet_ext[/] demo: {note}\n")

    photos = photographs.load_photographs()
    rows = _compare(photos, options, console)
    _print_wide(console, _table(rows))
    theirs, ours = _train(options, console)
    path = options.out / PICTURE
    attention = picture.attention_on(photos["china"], ours.network)
    picture.draw(path, photos["china"], attention, rows, ours, theirs, note)

    checks = [_exactness(rows), *_learning(ours, theirs)]
    for check in checks:
        verdict = "[green]ok    [/]" if check.holds else "[bold red]FAILED[/]"
        console.print(f"{verdict} {check.claim}: {check.figures}", highlight=False)
    console.print(f"\nPicture: {path}", highlight=False, soft_wrap=True)
    return all(check.holds for check in checks)


def _console() -> Console:
    """A log file has no width of its own: lines there get as much as they need."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


def _print_wide(console: Console, table: Table) -> None:
    """Rather wraps lines in a narrow terminal than cuts figures short."""
    width = console.width
    console.width = max(width, TABLE_WIDTH)
    console.print(table)
    console.width = width


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        names = re.findall(
            r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}"),
        console=console,
    )


def _compare(photos: dict[str, torch.Tensor], options: Options, console: Console) -> list[Row]:
    crops, repeats = (1, 3) if options.quick else (4, 7)
    rows = []
    with _progress(console) as progress:
        task = progress.add_task("photographs", total=len(CASES), remark="feature maps")
        maps = {
            stage.channels: photographs.feature_maps(photos, stage, crops)
            for stage in photographs.STAGES
        }
        for row in compare(maps, options.seed, repeats):
            rows.append(row)
            progress.update(task, advance=1, remark=row.name)
        progress.update(task, remark="")
    return rows


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"\nOn feature maps of photographs, batch {rows[0].shape[0]}, beside plain PyTorch",
        caption="Times are medians, of inference and of a training step. Memory is the peak of a "
        "training step beyond its inputs.\nError is the largest difference from the reference in "
        "float64, in units of the largest entry,\nover outputs, gradients and running "
        "statistics.\n",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=0,
    )
    table.add_column("\nfunction or module", no_wrap=True)
    table.add_column("\nfeature maps", no_wrap=True)
    for group in (" error", "infer ms", "train ms", "memory MB"):
        table.add_column(f"{group}\nplain", justify="right", no_wrap=True)
        table.add_column("\nours", justify="right", no_wrap=True)
        if "error" not in group:
            table.add_column("", justify="right", no_wrap=True)
    for row in rows:
        colour = "green" if row.passed else "bold red"
        table.add_row(
            row.name,
            row.size,
            f"{row.error.reference:.0e}",
            f"[{colour}]{row.error.ours:.0e}[/]",
            *_beside(row.inference, 1e3),
            *_beside(row.training, 1e3),
            *_beside(row.memory, 1e-6),
        )
    return table


def _beside(pair: Pair, unit: float) -> tuple[str, str, str]:
    """The reference, ours, and how many times smaller ours is."""
    ours, theirs = (f"{unit * value:.3g}" for value in (pair.ours, pair.reference))
    return theirs, ours, f"[bold]{pair.ratio:.1f}x[/]"


def _train(options: Options, console: Console) -> tuple[digits.Training, digits.Training]:
    """The same training with the reference and with ours."""
    epochs = options.epochs or (QUICK_EPOCHS if options.quick else EPOCHS)
    data = digits.load_digits(options.seed)
    steps = epochs * digits.steps_per_epoch(data)
    trainings = []
    with _progress(console) as progress:
        for label, namespace in (("digits, reference", reference), ("digits, cotnet_ext", modules)):
            task = progress.add_task(label, total=steps, remark="")

            def show(training: digits.Training, task=task) -> None:
                progress.update(task, advance=1, remark=f"loss {training.losses[-1]:.3f}")

            training = digits.train(namespace, data, options.seed, epochs, show)
            progress.update(
                task, remark=f"accuracy {training.accuracies[-1]:.1%}, {training.seconds:.1f} s"
            )
            trainings.append(training)
    return trainings[0], trainings[1]


def _exactness(rows: Sequence[Row]) -> Check:
    worst = max(rows, key=lambda row: row.error.ours / max(row.error.reference, FLOOR / MARGIN))
    return Check(
        f"errors are at most {MARGIN:g} times PyTorch's own in float32, or {FLOOR:g}",
        all(row.passed for row in rows),
        f"nearest to the limit is {worst.name}, {worst.error.ours:.1e} beside "
        f"{worst.error.reference:.1e}",
    )


def _learning(ours: digits.Training, theirs: digits.Training) -> list[Check]:
    steps = len(ours.losses) // len(ours.accuracies)
    first = _drift(ours.losses[:steps], theirs.losses[:steps])
    later = _drift(ours.epoch_losses, theirs.epoch_losses)
    final, expected = ours.accuracies[-1], theirs.accuracies[-1]
    checks = [
        Check(
            f"losses agree, within {FIRST_EPOCH_DRIFT:g} at each step of the first epoch and "
            f"{EPOCH_DRIFT:g} in the mean of every epoch",
            first <= FIRST_EPOCH_DRIFT and later <= EPOCH_DRIFT,
            f"{first:.1e} and {later:.1e}",
        ),
        Check(
            f"accuracies agree within {ACCURACY_DRIFT:.0%} at the end",
            abs(final - expected) <= ACCURACY_DRIFT,
            f"{final:.2%} and {expected:.2%}",
        ),
    ]
    if len(ours.accuracies) >= EPOCHS:
        checks.append(
            Check(
                f"at least {LEAST_ACCURACY:.0%} of the held-out digits are read rightly",
                min(final, expected) >= LEAST_ACCURACY,
                f"{final:.2%} and {expected:.2%}",
            )
        )
    return checks


def _drift(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two curves; NaN stays NaN."""
    return float((torch.tensor(ours) - torch.tensor(theirs)).abs().max())
