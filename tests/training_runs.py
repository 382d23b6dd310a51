"""Short trainings for the tests: on the digits, and on folders of small pictures."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch
from documents import ROOT
from training import main
from training.distributed import World
from training.options import Options

EXAMPLES = ROOT / "examples"
CONFIGS = EXAMPLES / "configs"

# Small and quick: 7 updates per epoch.
SHORT = Options(
    width=16, epochs=2, batch_size=192, lr=0.2, sched_on_updates=True, tensorboard=False, threads=2
)


def train(out: Path, **changes: Any) -> list[dict[str, Any]]:
    """`SHORT` with these changes, in this process; the rows of its epochs."""
    return main.train(dataclasses.replace(SHORT, out=str(out), **changes), World())


def flags(options: Options) -> list[str]:
    """The command line that says the same."""
    words = []
    for field in dataclasses.fields(options):
        value, flag = getattr(options, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what no two runs have in common."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Nested values are the same, tensors bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert first == second or (first != first and second != second), where


def assert_same_run(first: Path, second: Path) -> None:
    """Two trainings ended in the same state: weights, averages, optimiser, random numbers, log."""
    for name in ("last.pt", "best.pt"):
        states = [torch.load(out / name, weights_only=True) for out in (first, second)]
        for state in states:
            state.pop("options", None)
            state["history"] = timeless(state.get("history", []))
        assert_same(*states, name)
    assert timeless(table(first)) == timeless(table(second))


def make_pictures(folder: Path, train: int = 8, test: int = 3) -> Path:
    """Two classes, one reddish and one bluish, in the layout of ImageNet."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("val", test)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 128, (40, 36, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 127
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{number}.png")
    return folder
