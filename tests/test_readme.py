"""What the README shows works as written: its code runs, its commands and links exist."""

from __future__ import annotations

import re

import pytest
from documents import ROOT, blocks, broken_links, run_python, working_in

FILE = ROOT / "README.md"
README = FILE.read_text()


def test_there_are_examples():
    assert len(blocks(FILE, "python")) >= 3
    assert len(blocks(FILE, "bash")) >= 2


@pytest.mark.parametrize("block", blocks(FILE, "python"), ids=str)
def test_code_runs(block, tmp_path):
    with working_in(tmp_path):
        run_python(block)


def test_pickled_models_load(tmp_path, monkeypatch):
    """A model saved whole names the class of its modules; ours may stand under that name."""
    import torch

    import cotnet_ext
    from cotnet_ext import reference

    model = torch.nn.Sequential(reference.CoTAttention(16)).eval()
    torch.save(model, tmp_path / "model.pt")
    images = torch.randn(2, 16, 6, 5)
    expected = model(images)
    monkeypatch.setattr(reference, "CoTAttention", cotnet_ext.CoTAttention)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded[0]) is cotnet_ext.CoTAttention
    torch.testing.assert_close(loaded(images), expected)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    wanted = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README))
    assert {"demo", "test", "bench"} <= wanted
    for target in wanted:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    assert README.count("](") > 5
    assert broken_links(FILE) == []


def test_names_in_tables_exist():
    import cotnet_ext

    names = re.findall(r"^\| `(\w+)\(", README, re.MULTILINE)
    assert sorted(names) == sorted(set(names))
    public = {name for name in cotnet_ext.__all__ if callable(getattr(cotnet_ext, name))}
    assert set(names) == public - {"build_info"}


def test_build_variables_are_read():
    sources = [ROOT / "setup.py", *(ROOT / "build_backend").glob("*.py")]
    text = "".join(path.read_text() for path in sources)
    for variable in re.findall(r"^\| `(COTNET_EXT_\w+|[A-Z_]+)=", README, re.MULTILINE):
        assert variable in text, variable
