"""docs/training.md: its blocks run as they stand, and what only GPUs can run is at least said
rightly."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from documents import ROOT, blocks, broken_links, run_document
from training.options import check, parse
from training_runs import CONFIGS, table

DOCUMENT = ROOT / "docs" / "training.md"


def test_everything_shown_runs(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    printed = run_document(DOCUMENT, tmp_path)
    assert len(printed) == 6
    assert "network  cotnet50" in printed[4]
    assert [row["epoch"] for row in table(tmp_path / "digits")] == ["1", "2", "3"]
    assert "resumed after epoch 2" in printed[1]
    assert "2 x cpu" in printed[2]
    assert float(table(tmp_path / "digits_by_two")[-1]["top1"]) > 80
    weights = torch.load(tmp_path / "pictures_run" / "best.pt", weights_only=True)
    assert weights["arch"] == "cotnet50"
    assert (tmp_path / "curves.svg").read_text().count("another seed") >= 1


LAUNCHES = [
    line
    for block in blocks(DOCUMENT, "sh")
    for line in block.code.replace("\\\n", " ").splitlines()
    if line.startswith("torchrun")
]


@pytest.mark.parametrize("line", LAUNCHES, ids=range(len(LAUNCHES)))
def test_launches_are_understood(line):
    """torchrun takes its options, the script the rest."""
    from torch.distributed.run import get_args_parser

    words = shlex.split(line.replace("examples/configs", str(CONFIGS)))
    launch = get_args_parser().parse_args(words[1:])
    assert launch.training_script == "examples/train.py"
    options = parse(launch.training_script_args)
    check(options)
    assert options.model == "cotnet50" and options.data == "/data/imagenet"


def test_links_lead_somewhere():
    assert broken_links(DOCUMENT) == []


def test_recipes_are_told_as_they_are():
    rows = re.findall(
        r"^\| \[(\w+)\]\(\S+\)[^|]*\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
        DOCUMENT.read_text(),
        re.MULTILINE,
    )
    assert {row[0] for row in rows} == {path.stem for path in CONFIGS.glob("*cotne*.yaml")}
    for name, *values in rows:
        options = parse(["--config", str(CONFIGS / f"{name}.yaml")])
        said = [options.lr, options.batch_size, options.weight_decay, options.drop_path]
        assert [float(value) for value in values] == said
