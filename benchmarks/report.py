"""Rows -> Markdown: the figures to reach, then every measurement.

python -m benchmarks.report benchmarks/results/<machine>.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import plot
from .figures import REACHED, Figure, figures

# Rows that differ here are not mixed.
SETTING = ("device", "threads", "cold", "versions")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def write(path: Path) -> list[Path]:
    """Render the rows in `path` beside it, as `.md` and `.png`; returns what was written."""
    rows = newest(read_rows(path))
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    plot.draw(rows, picture)
    page.write_text(render(rows, picture.name))
    return [page, picture]


def contender_name(row: dict) -> str:
    return " ".join(filter(None, [row["provider"], row.get("dtype"), row.get("layout")]))


def newest(rows: list[dict]) -> list[dict]:
    """Of each comparison its last run, among the runs made like the last one."""
    rows = [row for row in rows if all(row.get(k) == rows[-1].get(k) for k in SETTING)]
    last_run = {row["comparison"]: row["run"] for row in rows}
    return [row for row in rows if last_run[row["comparison"]] == row["run"]]


def render(rows: list[dict], picture: str) -> str:
    parts = [
        _heading(rows),
        _failures(rows),
        "## Figures to reach\n\n" + _figures(rows),
        f"![share of copy bandwidth, speed-ups and memory]({picture})",
        "## All measurements\n\n" + LEGEND,
        *(_op(op, rows) for op in dict.fromkeys(row["op"] for row in rows)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


LEGEND = """\
Times are milliseconds of one call: median, and 20th to 80th percentile. GB/s counts every tensor
once (`byte_model.py`); "of copy" is that as a share of what `copy_` reached in the same rounds.
"x" is the time in units of the first line of the comparison, the median of the ratios of all
rounds. Peak is the most memory one call holds beyond its inputs. Error is relative to the
reference in float64."""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    rule = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _heading(rows: list[dict]) -> str:
    last = rows[-1]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items() if value)
    runs = {row["run"]: row for row in rows}.values()
    commands = [
        f"- `{run['command']}` at commit {run['commit'] or 'unknown'}, {run['time']}"
        for run in runs
    ]
    inputs = "cold inputs" if last["cold"] else "warm inputs"
    setting = f"{last['threads']} threads, {inputs}; {versions}"
    return "\n\n".join([f"# {last['device']}", setting, "\n".join(commands)])


def _failures(rows: list[dict]) -> str:
    lines = [
        f"- {row['comparison']}, {contender_name(row)}: {row['error']}"
        for row in rows
        if row["error"]
    ]
    return "## Errors: not timed\n\n" + "\n".join(lines) if lines else ""


def _figures(rows: list[dict]) -> str:
    judged = [(figure, *figure.judge(rows)) for figure in figures(rows[-1].get("gpu", False))]
    reached = sum(verdict == REACHED for _, _, verdict in judged)
    lines = [_figure_line(*each) for each in judged]
    head = ("where", "figure", "target", "measured", "verdict")
    return f"{reached} of {len(judged)} reached.\n\n" + table(head, lines)


def _figure_line(figure: Figure, measured: float | None, verdict: str) -> tuple[str, ...]:
    sign = "at most" if figure.at_most else "at least"
    return (
        figure.comparison,
        figure.claim,
        f"{sign} {figure.target:g}{figure.unit}",
        "-" if measured is None else f"{measured:.3g}{figure.unit}",
        verdict,
    )


HEAD = ("shape", "pass", "dtype", "layout", "who")
HEAD += ("ms", "p20 - p80", "GB/s", "of copy", "x", "peak MB", "error")


def _op(op: str, rows: list[dict]) -> str:
    lines = []
    previous = None
    for row in (row for row in rows if row["op"] == op):
        same = row["comparison"] == previous
        lines.append(_line(row, repeated=same))
        previous = row["comparison"]
    return f"### {op}\n\n" + table(HEAD, lines)


def _line(row: dict, repeated: bool) -> tuple[str, ...]:
    """One row; what it shares with the row above is left out."""
    ms = row["ms"]
    accuracy = row.get("accuracy")
    return (
        "" if repeated else row.get("shape", ""),
        "" if repeated else row["pass"],
        row.get("dtype", ""),
        row.get("layout", ""),
        row["provider"],
        _number(ms and ms["p50"]),
        f"{_number(ms['p20'])} - {_number(ms['p80'])}" if ms else "not timed",
        _number(row.get("gb_per_s")),
        _number(row.get("share_of_copy")),
        _number(row.get("ratio")),
        _number(row.get("peak_bytes"), scale=1e-6),
        f"{accuracy['error']:.0e}" if accuracy else "",
    )


def _number(value: float | None, scale: float = 1) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    value *= scale
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="a .jsonl file that `python -m benchmarks` wrote")
    for path in write(parser.parse_args().rows):
        print(path)


if __name__ == "__main__":
    main()
