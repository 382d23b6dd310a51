"""Images beside the attention of contextual layers on them, drawn into a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .._files import replacing

INK, FAINT = "#22303c", "#8a97a3"
MOST_IMAGES = 6
PANEL = 3.1  # inches
_ARROWS, _WINDOWS = 16, 8  # along a side of the map at most


@dataclass(frozen=True)
class Shown:
    """A row of the picture.

    Attributes:
        name: of the file.
        pixels: what the network saw, `[H, W, 3]` in 0..1.
        classes: the likeliest, best first, with their probabilities.
        weights: for each layer `[Cw, K, h, w]`, see `attention_of`.
    """

    name: str
    pixels: Tensor
    classes: Sequence[tuple[str, float]]
    weights: dict[str, Tensor]


def formats() -> list[str]:
    """The endings of files that can be drawn."""
    return sorted(Figure().canvas.get_supported_filetypes())


def draw(path: Path, title: str, rows: Sequence[Shown]) -> None:
    """Writes the picture; its format follows from the ending, and an old file stays until then.

    For each image there are two rows: above, for each layer, how strongly each pixel weighs its
    window and, as an arrow, where the centre of the weights lies; below, some of the windows.
    """
    columns, lines = 1 + len(rows[0].weights), 2 * len(rows)
    figure = Figure(figsize=(PANEL * columns, PANEL * lines + 1.1), dpi=120, facecolor="white")
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        lines,
        columns,
        left=0.15 / columns,
        right=1 - 0.05 / columns,
        bottom=0.35 / height,
        top=1 - 0.95 / height,
        wspace=0.08,
        hspace=0.2,
    )
    inch = 1 / height
    figure.text(0.05 / columns, 1 - 0.4 * inch, title, fontsize=15, weight="bold", color=INK)
    below = (
        "Colour: strength of the weights of each pixel's window, arrows: where their centre lies. "
        "Windows: red adds a neighbour, blue subtracts it."
    )
    figure.text(0.05 / columns, 0.1 * inch, below, fontsize=8.5, color=FAINT, wrap=True)
    for index, row in enumerate(rows):
        _draw_image(figure.add_subplot(grid[2 * index, 0]), row)
        _draw_classes(figure.add_subplot(grid[2 * index + 1, 0]), row)
        for column, (name, weights) in enumerate(row.weights.items(), 1):
            _draw_field(figure.add_subplot(grid[2 * index, column]), row, name, weights)
            _draw_windows(figure.add_subplot(grid[2 * index + 1, column]), row, weights)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:].lower())


def _bare(axes: Axes, title: str) -> None:
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=9, color=INK)


def _draw_image(axes: Axes, row: Shown) -> None:
    axes.imshow(row.pixels.numpy())
    _bare(axes, row.name if len(row.name) < 42 else f"...{row.name[-39:]}")


def _draw_classes(axes: Axes, row: Shown) -> None:
    """The likeliest classes as bars."""
    classes = row.classes[:5]
    for place, (label, probability) in enumerate(classes):
        axes.barh(place, probability, height=0.22, color="#d1495b" if place == 0 else "#30638e")
        text = label if len(label) < 34 else f"{label[:31]}..."
        axes.text(0, place - 0.22, f"{probability:.1%}  {text}", fontsize=9, color=INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(4.6, -0.8)
    axes.set_axis_off()


def _draw_field(axes: Axes, row: Shown, name: str, weights: Tensor) -> None:
    """Strength as colour over the image in grey, and an arrow to the centre of each window."""
    height, width = row.pixels.shape[:2]
    strength, right, down = field(weights)
    _draw_grey(axes, row.pixels)
    axes.imshow(
        strength.numpy(),
        cmap="inferno",
        alpha=0.6,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
    rows, columns = (_spread(size, _ARROWS) for size in strength.shape)
    x = (columns + 0.5) * width / strength.shape[1] - 0.5
    y = (rows + 0.5) * height / strength.shape[0] - 0.5
    at = torch.meshgrid(rows, columns, indexing="ij")
    arrows = [part[at].numpy() for part in (right, down)]
    axes.quiver(x.numpy(), y.numpy(), *arrows, color="white", angles="xy", pivot="mid", width=0.005)
    _bare(axes, f"{name}, {strength.shape[0]}x{strength.shape[1]}, {len(weights)} sets of weights")


def field(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Strength, and how far right and down the centre of the window's weights lies, `[h, w]` each.

    The strength is the mean of the absolute weights `[Cw, K, h, w]`; their centre is in pixels of
    the map.
    """
    size = weights.abs().mean(0)  # [K, h, w]
    side = round(len(size) ** 0.5)
    share = (size / size.sum(0).clamp(min=1e-12)).unflatten(0, (side, side))
    offset = (torch.arange(side) - side // 2).view(-1, 1, 1).float()
    return size.mean(0), (share.sum(0) * offset).sum(0), (share.sum(1) * offset).sum(0)


def _draw_windows(axes: Axes, row: Shown, weights: Tensor) -> None:
    """The weights of some pixels, enlarged, of the set that differs most between pixels."""
    height, width = row.pixels.shape[:2]
    chosen = weights[int(weights.var((2, 3)).mean(1).argmax())]
    side = round(len(chosen) ** 0.5)
    rows, columns = (_spread(size, _WINDOWS) for size in chosen.shape[1:])
    windows = chosen[:, rows][:, :, columns].unflatten(0, (side, side))
    # One cell of space around each window; NaN is not drawn.
    cell = side + 2
    canvas = torch.full((len(rows), cell, len(columns), cell), torch.nan)
    canvas[:, 1:-1, :, 1:-1] = windows.permute(2, 0, 3, 1)
    limit = float(windows.abs().max())
    _draw_grey(axes, row.pixels)
    axes.imshow(
        canvas.view(len(rows) * cell, len(columns) * cell).numpy(),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
    _bare(axes, f"windows of {side}x{side} at {len(rows)}x{len(columns)} places")


def _draw_grey(axes: Axes, pixels: Tensor) -> None:
    grey = pixels @ torch.tensor([0.299, 0.587, 0.114])
    axes.imshow(grey.numpy(), cmap="gray", vmin=-0.3, vmax=1)


def _spread(size: int, most: int) -> Tensor:
    """At most so many indices below `size`, in the middle of equal parts."""
    count = min(size, most)
    return ((torch.arange(count) + 0.5) * size / count).floor().long()
