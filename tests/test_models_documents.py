"""docs/models.md and docs/checkpoints.md: all that they show is run, in a folder of its own."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from documents import ROOT, blocks, broken_links, run_document

from cotnet_ext.models import create_model

MODELS, CHECKPOINTS = ROOT / "docs" / "models.md", ROOT / "docs" / "checkpoints.md"


def test_models(tmp_path, capsys):
    run_document(MODELS, tmp_path)
    printed = capsys.readouterr().out
    # What the comments beside `print` promise.
    for code in (block.code for block in blocks(MODELS, "python")):
        for promised in re.findall(r"^print\(.*\)  # ([^:\n]+)", code, re.MULTILINE):
            assert promised in printed


def test_checkpoints(tmp_path, capsys):
    torch.manual_seed(0)
    state = create_model("cotnet50").state_dict()
    official = {"epoch": 349, "arch": "cotnet50", "state_dict": state, "state_dict_ema": state}
    torch.save(official, tmp_path / "cotnet50.pth.tar")
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("cotnet_ext").addHandler(handler)
    try:
        printed = "".join(run_document(CHECKPOINTS, tmp_path))
    finally:
        logging.getLogger("cotnet_ext").removeHandler(handler)
    everything = printed + capsys.readouterr().out + "\n".join(said)
    shown = [block.code for block in blocks(CHECKPOINTS, "text") if "torch.save" not in block.code]
    assert len(shown) == 3
    for text in shown:
        assert text.strip() in everything
    assert (tmp_path / "mine.safetensors").exists()


@pytest.mark.parametrize("document", [MODELS, CHECKPOINTS], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    assert broken_links(document) == []
