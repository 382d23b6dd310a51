"""The demo's picture: the attention on a photograph, the training curves and the speed-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.colors
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from .compare import Row
from .digits import DigitNet, Training, local_weights
from .photographs import CREDIT

INK, FAINT = "#22303c", "#8a97a3"
OURS, THEIRS, THIRD = "#d1495b", "#30638e", "#edae49"
THEIR_LINE = {"color": THEIRS, "lw": 5, "alpha": 0.45, "solid_capstyle": "round"}
OUR_LINE = {"color": OURS, "lw": 1.4, "marker": "o", "ms": 3.5}
SHRINK = 4  # the network was trained on coarse images, so it sees the photograph at a quarter
# Where attention is drawn, in pixels of china.jpg (x, y), and the place of its enlargement.
SPOTS = (
    ((205, 40), (285, 42)),  # finial against the sky
    ((104, 122), (42, 62)),  # tip of the upper roof
    ((270, 172), (392, 118)),  # eaves
    ((148, 268), (40, 318)),  # roof tiles
    ((460, 236), (420, 182)),  # far shore
    ((404, 290), (392, 356)),  # water
    ((588, 190), (520, 130)),  # tree against the lake
    ((478, 330), (560, 372)),  # foliage
)


@dataclass(frozen=True)
class Attention:
    """A photograph in grey as the network saw it `[H, W]`, and the weights `[9, H, W]` of the
    weight channel (`channel` of `channels`) that changes most from pixel to pixel."""

    grey: Tensor
    weights: Tensor
    channel: int
    channels: int


def attention_on(photograph: Tensor, network: DigitNet) -> Attention:
    """Lets the digits network look at a photograph `[3, H, W]` (0..1) in grey."""
    luma = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
    grey = F.avg_pool2d((photograph * luma).sum(1, keepdim=True), SHRINK)
    weights = local_weights(network, grey * 2 - 1)[0]
    channel = int(weights.var((2, 3)).mean(1).argmax())
    return Attention(grey[0, 0], weights[channel], channel, len(weights))


def draw(
    path: Path,
    photograph: Tensor,
    attention: Attention,
    rows: Sequence[Row],
    ours: Training,
    theirs: Training,
    note: str,
) -> None:
    """Writes the picture to `path` (PNG). `note` says on what it was measured."""
    figure = Figure(figsize=(15, 11.2), dpi=120, facecolor="white")
    edges = {"left": 0.04, "right": 0.975}
    upper = figure.add_gridspec(1, 2, top=0.872, bottom=0.483, wspace=0.03, **edges)
    lower = figure.add_gridspec(
        1, 3, top=0.385, bottom=0.085, width_ratios=(1, 1, 0.95), wspace=0.4, **edges
    )
    figure.text(0.04, 0.95, "cotnet_ext", fontsize=23, weight="bold", color=INK)
    motto = "contextual transformer blocks: every pixel gets weights made of its surroundings"
    figure.text(0.172, 0.952, motto, fontsize=14, color=FAINT)
    figure.text(0.04, 0.02, f"{note}   ·   {CREDIT}", fontsize=8.5, color=FAINT)
    _draw_photograph(figure.add_subplot(upper[0]), photograph, attention)
    _draw_directions(figure.add_subplot(upper[1]), attention)
    _draw_losses(figure.add_subplot(lower[0]), ours, theirs)
    _draw_accuracies(figure.add_subplot(lower[1]), ours, theirs)
    _draw_speedups(figure.add_subplot(lower[2]), rows)
    figure.savefig(path)


def _title(axes: Axes, title: str, below: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=INK, pad=22 if below else 8)
    if below:
        axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9, color=FAINT, va="bottom")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)


def _draw_photograph(axes: Axes, photograph: Tensor, attention: Attention) -> None:
    """The photograph with the 3x3 weights of the `SPOTS`, enlarged beside them."""
    axes.imshow(photograph.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    axes.set_anchor("W")
    _title(
        axes,
        "What a CotLayer that learned to read digits makes of a photograph",
        "its 3x3 weights at a few pixels: red adds the neighbour, blue subtracts it (seen in grey, "
        f"weight channel {attention.channel + 1} of {attention.channels})",
    )
    taps = {
        spot: attention.weights[:, y // SHRINK, x // SHRINK].reshape(3, 3)
        for spot, _ in SPOTS
        for x, y in [spot]
    }
    limit = max(float(weights.abs().max()) for weights in taps.values())
    for spot, place in SPOTS:
        _enlarge(axes, spot, place, taps[spot], limit)
    axes.set_xlim(-0.5, photograph.shape[2] - 0.5)
    axes.set_ylim(photograph.shape[1] - 0.5, -0.5)


def _enlarge(
    axes: Axes, spot: tuple[int, int], place: tuple[int, int], taps: Tensor, limit: float
) -> None:
    """A frame around the 3x3 window at `spot`, a line to `place`, and the weights there."""
    reach, half = 1.5 * SHRINK, 24
    x, y = ((at // SHRINK + 0.5) * SHRINK - 0.5 for at in spot)
    left, top = place
    for colour, width in ((INK, 2.6), ("white", 1.3)):
        axes.plot([x, left], [y, top], color=colour, lw=width, zorder=3)
        corner = (x - reach, y - reach)
        axes.add_patch(
            Rectangle(corner, 2 * reach, 2 * reach, fill=False, ec=colour, lw=width, zorder=4)
        )
    extent = (left - half, left + half, top + half, top - half)
    axes.imshow(taps.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, zorder=5)
    for colour, width in ((INK, 3.4), ("white", 1.8)):
        axes.add_patch(
            Rectangle(
                (left - half, top - half),
                2 * half,
                2 * half,
                fill=False,
                ec=colour,
                lw=width,
                zorder=6,
            )  # fmt: skip
        )


def _draw_directions(axes: Axes, attention: Attention) -> None:
    """Every pixel coloured by where the weight of its window lies."""
    share = attention.weights.softmax(0).unflatten(0, (3, 3))
    offset = torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    right, down = (share.sum(0) * offset).sum(0), (share.sum(1) * offset).sum(0)
    axes.imshow(_colour(right, down))
    axes.set_axis_off()
    axes.set_anchor("E")
    _title(
        axes,
        "Where each pixel looks",
        "hue: direction of the centre of its 3x3 weights, after a softmax; strength: how far away",
    )
    wheel = axes.inset_axes((0.885, 0.025, 0.105, 0.16))
    grid = torch.linspace(-1, 1, 161)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    disc = torch.as_tensor(_colour(x, y, full=1.0))
    inside = ((x**2 + y**2) <= 1).double().unsqueeze(2)
    wheel.imshow(torch.cat([disc, inside], 2).numpy())
    wheel.set_axis_off()


def _colour(right: Tensor, down: Tensor, full: float | None = None):
    """RGB `[H, W, 3]`: direction as hue, length as strength (1 at `full`, or the 98 % quantile)."""
    length = (right**2 + down**2).sqrt()
    strength = (length / (full or length.quantile(0.98))).clamp(max=1)
    hue = (torch.atan2(down, right) / (2 * torch.pi)) % 1
    hsv = torch.stack([hue, 0.85 * strength, 0.98 - 0.25 * strength], -1)
    return matplotlib.colors.hsv_to_rgb(hsv.numpy())


def _draw_losses(axes: Axes, ours: Training, theirs: Training) -> None:
    _plain(axes)
    _title(axes, "Digits: training loss", "same seed; faint: every step, bold: mean of the epoch")
    epochs = range(1, len(ours.accuracies) + 1)
    steps = len(ours.losses) / len(ours.accuracies)
    positions = [step / steps + 0.5 for step in range(len(ours.losses))]
    axes.plot(positions, theirs.losses, color=THEIRS, lw=2.2, alpha=0.2)
    axes.plot(positions, ours.losses, color=OURS, lw=0.6, alpha=0.35)
    axes.plot(epochs, theirs.epoch_losses, **THEIR_LINE, label=f"reference, {theirs.seconds:.1f} s")
    axes.plot(epochs, ours.epoch_losses, **OUR_LINE, label=f"cotnet_ext, {ours.seconds:.1f} s")
    axes.set_yscale("log")
    axes.set_xlim(left=0.3)
    axes.set_xlabel("epoch", color=INK, fontsize=9)
    axes.legend(frameon=False, fontsize=9)


def _draw_accuracies(axes: Axes, ours: Training, theirs: Training) -> None:
    _plain(axes)
    _title(axes, "Digits: held-out accuracy", f"360 digits, {ours.accuracies[-1]:.1%} at the end")
    epochs = range(1, len(ours.accuracies) + 1)
    percent = [[100 * value for value in t.accuracies] for t in (theirs, ours)]
    axes.axhline(97, color=THIRD, lw=1.2, ls=(0, (4, 3)))
    axes.text(1, 97.4, "97 %", fontsize=8.5, color=THIRD, va="bottom")
    axes.plot(epochs, percent[0], **THEIR_LINE, label="reference")
    axes.plot(epochs, percent[1], **OUR_LINE, label="cotnet_ext")
    axes.set_xlabel("epoch", color=INK, fontsize=9)
    axes.set_ylabel("%", color=INK, fontsize=9)
    axes.set_ylim(top=101)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_speedups(axes: Axes, rows: Sequence[Row]) -> None:
    _plain(axes)
    _title(axes, "Times as fast as the reference", f"batch {rows[0].shape[0]}")
    places = torch.arange(len(rows)).numpy()
    labels = [f"{row.name}\n{row.size}" for row in rows]
    for shift, colour, label, values in (
        (-0.2, OURS, "inference", [row.inference.ratio for row in rows]),
        (0.2, THIRD, "training step", [row.training.ratio for row in rows]),
    ):
        axes.barh(places + shift, values, height=0.38, color=colour, label=label)
        for place, value in zip(places + shift, values, strict=True):
            axes.text(value * 1.04, place, f"{value:.1f}", va="center", fontsize=7.5, color=INK)
    axes.axvline(1, color=INK, lw=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, labels, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    above = {"loc": "lower right", "bbox_to_anchor": (1.03, 0.985), "ncols": 2}
    axes.legend(frameon=False, fontsize=8.5, handlelength=1, columnspacing=1, **above)
