"""Measure everything, append the rows to a file, and write the report beside it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __path__ as package_path
from . import environment, report
from .comparison import Options

RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32", "float16", "bfloat16")
QUICK = Options(quick=True, budget_s=0.05, rotate_bytes=1 << 20)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a contender failed or gave a wrong result."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = _parser().parse_args(arguments)
    benchmarks = chosen.only or names()
    options = _options(chosen)
    torch.set_num_threads(1 if options.own_process else options.threads)
    common = environment.describe(options.device, options.threads, arguments)
    common["cold"] = not options.warm
    path = chosen.out or _default_path(common["device"], chosen.quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    with path.open("a") as file:
        for row in _rows(benchmarks, options):
            file.write(json.dumps({**common, **row}) + "\n")
            file.flush()
            print(_line(row), flush=True)
            failures += row["error"] is not None
    print(*[path, *report.write(path)], sep="\n")
    if failures:
        print(f"{failures} of the above failed and were not timed", file=sys.stderr)
    return int(failures > 0)


def names() -> list[str]:
    """The benchmarks there are: every `bench_<name>.py` of this package."""
    modules = sorted(module.name for module in pkgutil.iter_modules(package_path))
    return [name.removeprefix("bench_") for name in modules if name.startswith("bench_")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), help=str(names()))
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds per comparison")
    parser.add_argument("--rotate", type=int, metavar="MB", help="size of all inputs of one kind")
    parser.add_argument("--warm", action="store_true", help="the same inputs again and again")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled baselines")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="on a GPU; default: all")
    parser.add_argument("--official", type=Path, metavar="DIR", help="checkout of JDAI-CV/CoTNet")
    parser.add_argument("--quick", action="store_true", help="every path on tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append rows to this file")
    return parser


def _options(chosen: argparse.Namespace) -> Options:
    options = QUICK if chosen.quick else Options()
    return dataclasses.replace(
        options,
        device=chosen.device,
        threads=chosen.threads,
        own_process=torch.device(chosen.device).type == "cpu" and not chosen.quick,
        gpu=torch.device(chosen.device).type == "cuda",
        official=chosen.official,
        only_dtypes=tuple(chosen.dtypes or ()),
        warm=chosen.warm,
        compiled=not chosen.no_compile,
        budget_s=options.budget_s if chosen.budget is None else chosen.budget,
        rotate_bytes=options.rotate_bytes if chosen.rotate is None else chosen.rotate << 20,
    )


def _default_path(device: str, quick: bool) -> Path:
    """One file per machine. Quick numbers mean nothing and stay out of the results."""
    folder = environment.ROOT / "build" / "benchmarks" if quick else RESULTS
    return folder / f"{environment.slug(device)}.jsonl"


def _rows(chosen: list[str], options: Options) -> Iterator[dict]:
    for name in chosen:
        yield from importlib.import_module(f"{__package__}.bench_{name}").rows(options)


def _line(row: dict) -> str:
    who = report.contender_name(row)
    if row["error"]:
        return f"{row['comparison']:<64} {who:<36} {row['error']}"
    ratio = row.get("ratio")
    share = row.get("share_of_copy")
    return "".join(
        [
            f"{row['comparison']:<64} {who:<36} {row['ms']['p50']:9.4f} ms",
            f"{ratio:8.2f}x" if ratio else "",
            f"  {share:.2f} of copy" if share else "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
