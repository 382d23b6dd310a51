"""The documents about existing models and about detection do what they show."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from detector import Detector
from documents import ROOT, broken_links, run_document

from cotnet_ext import reference

DOCUMENTS = ("convert.md", "detection.md")


@pytest.fixture
def others(tmp_path, monkeypatch):
    """A folder with the files of other projects that the documents import and load."""
    for name in ("model/attention/CoTAttention.py", "models/cotnet.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(inspect.getsource(reference))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("model", "models")]:
        del sys.modules[name]


def test_existing_models(others, capsys):
    from models import cotnet

    torch.save({"model": Detector(cotnet).half(), "ema": None}, others / "best.pt")
    run_document(ROOT / "docs" / "convert.md", others)
    printed = capsys.readouterr().out.replace("document.Shortcut", "__main__.Shortcut")
    assert "<class 'cotnet_ext.modules.CoTAttention'>\n" in printed
    text = (ROOT / "docs" / "convert.md").read_text()
    assert text.partition("```text\n")[2].partition("```")[0] in printed
    assert "2 would be swapped\n" in printed


def test_detection(tmp_path, capsys):
    run_document(ROOT / "docs" / "detection.md", tmp_path)
    printed = capsys.readouterr().out
    for line in (
        "[512, 1024, 2048]",
        "[8, 16, 32]",
        "[(2, 512, 32, 40), (2, 1024, 16, 20), (2, 2048, 8, 10)]",
        "torch.Size([2, 256, 16, 16]) torch.Size([2, 2048, 8, 8])",
    ):
        assert line in printed
    loss, _, rest = printed.partition("loss ")[2].partition(",")
    assert 0 < float(loss) < 100
    assert rest.startswith(" 0 weights without a gradient\n")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    assert broken_links(ROOT / "docs" / name) == []
