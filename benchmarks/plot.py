"""The picture of a report: per op how near to a copy and how much faster, then the modules."""

from __future__ import annotations

from pathlib import Path

from .comparison import SUBJECT

INK, GRID = "#222222", "#dddddd"
COLOURS = {
    "contiguous": "#1f5fa8",
    "channels_last": "#e07b39",
    "unfold": "#9467bd",
    "shift": "#3d9970",
    "shift, compiled": "#b3475a",
    "one thread per result": "#7f7f7f",
    "official CuPy": "#c7a300",
    "reference": "#9467bd",
    "reference, compiled": "#b3475a",
    "time": "#1f5fa8",
    "peak memory": "#e07b39",
}
OPS = (
    "local_aggregation",
    "softmax_aggregation",
    "group_norm_aggregation",
    "spatial_softmax_gate",
    "context_fusion",
)
MODULES = ("CoTAttention", "CotLayer", "CoXtLayer")
PEERS = ("unfold", "shift", "shift, compiled", "reference", "reference, compiled")
PEERS += ("one thread per result", "official CuPy")

Bars = dict[str, dict[str, float]]  # series -> label on the axis -> height


def draw(rows: list[dict], path: Path) -> None:
    """Write the picture of the float32 rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["comparison"].endswith("float32") and not row["error"]]
    figure = Figure(figsize=(15, 21), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("cotnet_ext in float32", color=INK, fontsize=16)
    grid = figure.add_gridspec(len(OPS) + 1, 2)
    for line, op in enumerate(OPS):
        mine = [row for row in rows if row["op"] == op]
        _panel(figure.add_subplot(grid[line, 0]), f"{op}: share of copy bandwidth", _shares(mine))
        speed = figure.add_subplot(grid[line, 1])
        _panel(speed, f"{op}: times faster than", _speed_ups(mine), log=True)
    modules = figure.add_subplot(grid[len(OPS), :])
    title = "modules: reference / cotnet_ext"
    _panel(modules, title, _module_ratios([r for r in rows if r["op"] in MODULES]), log=True)
    figure.savefig(path, dpi=100)


def _shares(rows: list[dict]) -> Bars:
    bars: Bars = {}
    for row in rows:
        if row["provider"] == SUBJECT and row["share_of_copy"] is not None:
            bars.setdefault(row["layout"], {})[_place(row)] = row["share_of_copy"]
    return bars


def _speed_ups(rows: list[dict]) -> Bars:
    bars: Bars = {}
    for row in rows:
        if row["provider"] in PEERS and row["ratio"] is not None:
            bars.setdefault(row["provider"], {})[_place(row)] = row["ratio"]
    return bars


def _module_ratios(rows: list[dict]) -> Bars:
    bars: Bars = {}
    for row in rows:
        if row["provider"] == "reference" and row["ratio"] is not None:
            place = f"{row['op']}\n{_place(row)}"
            bars.setdefault("time", {})[place] = row["ratio"]
            bars.setdefault("peak memory", {})[place] = row["peak_ratio"]
    return bars


def _place(row: dict) -> str:
    return f"{row['shape']}\n{row['pass'].replace('forward+backward', 'with backward')}"


def _panel(axes, title: str, bars: Bars, log: bool = False) -> None:
    """Groups of bars, one group per label, one colour per series; a line at 1.

    Bars of a logarithmic panel begin at that line.
    """
    labels = list(dict.fromkeys(label for series in bars.values() for label in series))
    width = 0.8 / max(1, len(bars))
    bottom = 1 if log else 0
    for position, (name, heights) in enumerate(bars.items()):
        places = [labels.index(label) - 0.4 + (position + 0.5) * width for label in heights]
        tall = [height - bottom for height in heights.values()]
        axes.bar(places, tall, width, bottom, label=name, color=COLOURS[name])
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xticks(range(len(labels)), labels, fontsize=6.5)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right"]].set_visible(False)
    if labels and log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}x")
    if labels:
        axes.legend(
            frameon=False, ncols=len(bars), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1)
        )
