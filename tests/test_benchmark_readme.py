"""README.md shows what the results say, and nothing else is touched when its tables are made."""

from __future__ import annotations

import json
import re

import pytest
from documents import ROOT

from benchmarks import readme

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_results_that_readme_names():
    (page,) = set(re.findall(r"\(benchmarks/results/(\S+)\.md\)", README))
    results = ROOT / "benchmarks" / "results" / f"{page}.jsonl"
    assert readme.replaced(README, results) == README


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of one comparison, in a repository of their own."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    common = {
        "run": "r", "device": "Some(R) Processor", "threads": 2, "cold": True,
        "versions": {"torch": "2.13.0+cpu"}, "op": "CotLayer", "pass": "eval",
        "shape": "4x64x56x56", "comparison": "CotLayer, eval, 4x64x56x56, float32",
        "dtype": "float32", "peak_ratio": None,
    }  # fmt: skip
    rows = [
        {"provider": "cotnet_ext", "layout": "contiguous", "ms": {"p50": 1.234}, "ratio": 1.0},
        {"provider": "cotnet_ext", "layout": "channels_last", "ms": {"p50": 9.9}, "ratio": 8.0},
        {"provider": "reference", "layout": "contiguous", "ms": {"p50": 4.2}, "ratio": 3.44},
    ]
    path = tmp_path / "machine.jsonl"
    path.write_text("".join(json.dumps(common | row) + "\n" for row in rows))
    return path


def test_a_table_has_the_lines_and_columns_that_were_measured(results):
    text = readme.render(results)
    assert text.count(":--") == 1  # one table
    assert "| module | ms | plain PyTorch |\n" in text  # no memory, nothing compiled
    assert "| `CotLayer` eval, 4x64x56x56 | 1.23 | 3.4x |\n" in text
    assert "On 2 threads of Some Processor, PyTorch 2.13.0" in text
    assert text.endswith("[benchmarks/results](machine.md).\n")


def test_only_what_stands_between_the_marks_changes(results):
    page = f"before\n{readme.BEGIN}old\n{readme.END}\nafter\n"
    new = readme.replaced(page, results)
    assert new == f"before\n{readme.BEGIN}{readme.render(results)}{readme.END}\nafter\n"
    assert readme.replaced(new, results) == new
