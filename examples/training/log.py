"""What a training tells: lines and a progress bar on the terminal, a table, TensorBoard."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cotnet_ext._files import replacing

TABLE = "log.csv"


class Log:
    """Writes on the first process and is silent on the others."""

    def __init__(self, out: Path, first: bool, tensorboard: bool, next_step: int) -> None:
        """`next_step` is the first update that has not been logged yet."""
        self.out = out
        self.first = first
        self._console = Console(quiet=not first, highlight=False, soft_wrap=True)
        self._writer = None
        if first and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=next_step)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def progress(self, epoch: int, epochs: int, steps: int) -> Progress:
        """A bar over the steps of an epoch, only on a terminal; its task is number 0."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=self._console,
            transient=True,
            disable=not (self.first and self._console.is_terminal),
        )
        bar.add_task(f"epoch {epoch + 1}/{epochs}", total=steps, remark="")
        return bar

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def epoch(self, row: dict[str, Any], history: list[dict[str, Any]], step: int) -> None:
        """Shows the row of an epoch; the table is written anew from the whole history."""
        if not self.first:
            return
        words = [f"epoch {row['epoch']:3}"]
        for name in ("loss", "test_loss", "top1", "top5", "ema_top1"):
            if name in row:
                share = f"{row[name]:.2f} %" if "top" in name else f"{row[name]:.4f}"
                words.append(f"{name.replace('_', ' ')} {share}")
        words.append(f"{row['images_per_second']:.0f} images/s")
        self.line("   ".join(words))
        self.scalars({f"epoch/{name}": value for name, value in row.items()}, step)
        if self._writer:
            self._writer.flush()
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(row), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({name: past.get(name, "") for name in row} for past in history)
        with replacing(self.out / TABLE) as unfinished:
            unfinished.write_text(table.getvalue())

    def close(self) -> None:
        if self._writer:
            self._writer.close()
