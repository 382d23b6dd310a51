"""Rows -> the tables between the marks of README.md.

python -m benchmarks.readme benchmarks/results/<machine>.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from .comparison import SUBJECT, comparison_name
from .environment import ROOT
from .networks import NETWORKS
from .report import newest, read_rows, table
from .shapes import STAGES

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmark:begin -->\n", "<!-- benchmark:end -->"
HALF_PROVIDER = f"{SUBJECT}, bfloat16"
NONE = "-"  # a cell of what was not measured
MODULES = ("CoTAttention", "CotLayer", "CoXtLayer")

# The rows of one comparison in float32 and NCHW, by contender.
Contenders = dict[str, dict]
# A column: its head, and its cell for a comparison.
Column = tuple[str, Callable[[Contenders], str]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("results", type=Path, help="rows that a run has written")
    README.write_text(replaced(README.read_text(), parser.parse_args(arguments).results))


def replaced(page: str, results: Path) -> str:
    """The page with the tables of these results between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + render(results) + END + after


def render(results: Path) -> str:
    rows = newest(read_rows(results))
    comparisons: dict[str, Contenders] = {}
    for row in rows:
        provider, kind = row["provider"], (row.get("dtype"), row.get("layout"))
        if kind == ("float32", "contiguous") or provider == HALF_PROVIDER:
            comparisons.setdefault(row["comparison"], {})[provider] = row
    parts = [_setting(rows[-1])]
    parts += [table(head, lines) for head, lines in _tables(comparisons) if lines]
    page = results.with_suffix(".md").resolve().relative_to(ROOT)
    parts.append(REST.format(path=page.as_posix()))
    return "\n\n".join(parts) + "\n"


REST = """\
Part of the gain of modules, of small ones most, is page faults: plain PyTorch makes more
temporaries, and a process that has never freed anything large gets their memory anew in every call
([how that is measured](benchmarks/README.md#method)).

Everything that was measured, with spread, memory, errors and the commands, and which of the figures
that the project aims at are reached and which are missed, is in
[benchmarks/results]({path})."""


def _setting(row: dict) -> str:
    device, torch = row["device"].replace("(R)", ""), row["versions"]["torch"].split("+")[0]
    return f"""\
On {row["threads"]} threads of {device}, PyTorch {torch}, float32, NCHW, with inputs that have
left the caches. Medians; all columns of a row were measured in turns in one run. *Of copy*: the
bytes that have to be moved, over the time, as a share of what `copy_` of as many bytes reached.
*x*: how many times longer the others take."""


# ---- columns -------------------------------------------------------------------------------------


def _ms(contenders: Contenders, provider: str = SUBJECT) -> str:
    ms = contenders.get(provider, {}).get("ms")
    return f"{ms['p50']:.2f}" if ms else NONE


def _times(contenders: Contenders, provider: str, read: str = "ratio") -> str:
    """How many times longer somebody takes; with `read="peak_ratio"`, how much more memory."""
    ratio = contenders.get(provider, {}).get(read)
    return f"{ratio:.1f}x" if ratio else NONE


def times(head: str, provider: str, read: str = "ratio") -> Column:
    return head, lambda contenders: _times(contenders, provider, read)


def _share(contenders: Contenders) -> str:
    share = contenders[SUBJECT]["share_of_copy"]
    return f"{share:.2f}" if share else NONE


def _over_plain(contenders: Contenders) -> str:
    ratio = contenders.get("local_aggregation", {}).get("ratio")
    return f"{1 / ratio:.2f}" if ratio else NONE


MS: Column = "ms", _ms
PLAIN = times("plain PyTorch", "reference")
COMPILED = times("the same, compiled", "reference, compiled")
MEMORY = times("peak memory, plain PyTorch / ours", "reference", "peak_ratio")
UNFOLD, SHIFT = times("`unfold`", "unfold"), times("shift and sum", "shift")
SHIFT_COMPILED = times("compiled", "shift, compiled")
HALF: Column = "ms in bfloat16", lambda contenders: _ms(contenders, HALF_PROVIDER)


# ---- tables --------------------------------------------------------------------------------------


def _tables(comparisons: dict[str, Contenders]) -> Iterator[tuple[list[str], list[list[str]]]]:
    def lines(head: str, named: dict[str, str], *columns: Column):
        """A line for each comparison that was made, by what the line is called."""
        found = {name: comparisons[key] for name, key in named.items() if key in comparisons}
        cells = {title: [cell(one) for one in found.values()] for title, cell in columns}
        cells = {title: cell for title, cell in cells.items() if set(cell) != {NONE}}
        return [head, *cells], [[*line] for line in zip(found, *cells.values(), strict=True)]

    forward, both = "forward", "forward+backward"
    runs = [(direction, s) for direction in (forward, both) for s in STAGES]
    named = {f"{d}, {s}": comparison_name("local_aggregation", d, s) for d, s in runs}
    of_copy: Column = "of copy", _share
    yield lines("`local_aggregation`", named, MS, of_copy, UNFOLD, SHIFT, SHIFT_COMPILED)
    fused = [(op, s) for op in ("softmax_aggregation", "group_norm_aggregation") for s in STAGES]
    named = {f"`{op}`, {s}": comparison_name(op, both, s) for op, s in fused}
    over_plain: Column = "time / `local_aggregation`", _over_plain
    head = f"fused function, {both}"
    yield lines(head, named, MS, over_plain, UNFOLD, SHIFT_COMPILED)
    named = {
        f"`{row['op']}` {row['pass']}, {row['shape']}": key
        for key, contenders in comparisons.items()
        if (row := contenders.get(SUBJECT)) and row["op"] in MODULES
    }
    yield lines("module", named, MS, PLAIN, COMPILED, MEMORY)
    layers = [(name, s) for name in MODULES for s in STAGES]
    named = {f"`{m}`, {s}": comparison_name(f"optimised {m}", "eval", s) for m, s in layers}
    yield lines("`optimize_for_inference`", named, MS, PLAIN, COMPILED)
    named = {}
    for network in NETWORKS:
        shape = network.eval_shape
        named[f"`{network.name}` optimised, {shape}"] = comparison_name(network.name, "eval", shape)
        if (shape := network.train_shape) is not None:
            key = comparison_name(network.name, "train step", shape)
            named[f"`{network.name}` train step, {shape}"] = key
    yield lines("network", named, MS, PLAIN, COMPILED, MEMORY, HALF)


if __name__ == "__main__":
    main()
