"""Weights in files: every layout that is read, every file that is refused, and what is written."""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import pathlib
import sys
import types

import numpy
import pytest
import torch
from test_cli import assert_refused, run
from torch import nn

from cotnet_ext import checkpoints
from cotnet_ext.checkpoints import CheckpointError, load_into, read, write
from cotnet_ext.models import create_model, identify

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "bn.num_batches_tracked": torch.tensor(3)}
AVERAGE = {"conv.weight": torch.ones(2, 3), "bn.num_batches_tracked": torch.tensor(3)}


def prefixed(prefix: str, state: dict = STATE) -> dict:
    return {prefix + key: value for key, value in state.items()}


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def official(state: dict, average: dict | None = None, args: object = None) -> dict:
    """What `utils/checkpoint_saver.py` of JDAI-CV/CoTNet writes."""
    contents = {
        "epoch": 349,
        "arch": args,
        "state_dict": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
        "version": 2,
        "args": args,
        "metric": 81.3,
    }
    return contents if average is None else {**contents, "state_dict_ema": average}


@pytest.fixture
def settings(monkeypatch):
    """An object of a class with the name that the configuration of the official code has."""

    class CfgNode(dict):
        __module__, __qualname__ = "yacs.config", "CfgNode"

        def __init__(self, values: dict) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode({"model": CfgNode({"name": "cotnet50", "drop": 0.25})})


# ---- Reading -------------------------------------------------------------------------------------

LAYOUTS = {
    "official": (official(STATE, AVERAGE), "state_dict_ema", AVERAGE),
    "official without average": (official(STATE), "state_dict", STATE),
    "data parallel": (official(prefixed("module.")), "state_dict", STATE),
    "plain": (STATE, "", STATE),
    "compiled": (prefixed("_orig_mod.module."), "", STATE),
    "wrapped twice": ({"model": {"state_dict": STATE}}, "model.state_dict", STATE),
    "average that is none": (official(STATE) | {"state_dict_ema": None}, "state_dict", STATE),
    "timm's ModelEma": ({"model_ema": prefixed("module.", AVERAGE)}, "model_ema", AVERAGE),
    "swa_utils": ({"n_averaged": torch.tensor(5), **prefixed("module.")}, "", STATE),
    "lightning": ({"state_dict": prefixed("model."), "callbacks": {}}, "state_dict", STATE),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, zipped):
    contents, part, expected = LAYOUTS[layout]
    path = tmp_path / "weights.pth.tar"
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read(path)
    assert same(checkpoint.tensors, expected)
    assert checkpoint.part == part
    assert checkpoint.averaged == (expected is AVERAGE)


def test_the_weights_themselves_can_be_asked_for(tmp_path):
    torch.save(official(STATE, AVERAGE), tmp_path / "weights.pth.tar")
    checkpoint = read(tmp_path / "weights.pth.tar", ema=False)
    assert same(checkpoint.tensors, STATE)
    assert (checkpoint.part, checkpoint.averaged) == ("state_dict", False)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_settings_beside_the_weights_are_plain_data(tmp_path, monkeypatch, settings, zipped):
    """The official `args` are of yacs, others' of argparse: read without either."""
    path = tmp_path / "weights.pth.tar"
    contents = official(STATE, args=settings) | {
        "options": argparse.Namespace(lr=0.1, folder=pathlib.Path("runs")),
        "metric": numpy.float64(81.3),
    }
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setitem(sys.modules, "yacs", None)
    monkeypatch.setitem(sys.modules, "yacs.config", None)
    assert same(read(path).tensors, STATE)


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(STATE, path, {"model": "none"})
    assert same(read(path).tensors, STATE)
    assert read(path).part == ""
    # The contents decide, not the name.
    path.rename(tmp_path / "weights.pth")
    assert same(read(tmp_path / "weights.pth").tensors, STATE)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


class Custom:
    pass


@pytest.mark.parametrize(("thing", "name"), [(Harmful(), "mkdir"), (Custom(), "Custom")])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_that_need_code_are_refused(tmp_path, monkeypatch, thing, name, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(official(STATE, args=thing), "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"'w\.pth' needs \S*{name} of Python.*weights_only"):
        read("w.pth")
    assert os.listdir() == ["w.pth"]


def test_whole_models_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="needs torch.nn.modules.linear.Linear of Python"):
        read(path)


def damaged(tmp_path, **options) -> bytes:
    torch.save({"conv.weight": torch.rand(100, 100)}, tmp_path / "whole.pth", **options)
    return (tmp_path / "whole.pth").read_bytes()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_files_that_were_cut_off(tmp_path, zipped, share):
    contents = damaged(tmp_path, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "cut.pth"
    path.write_bytes(contents[: int(len(contents) * share)])
    with pytest.raises(CheckpointError, match=r"cut.pth' is damaged or was not written by torch.s"):
        read(path)


def test_a_safetensors_file_that_was_cut_off(tmp_path):
    path = tmp_path / "cut.safetensors"
    write({"conv.weight": torch.rand(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="cut.safetensors' is damaged: "):
        read(path)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Google Drive can't scan this file", "is a web page"),
        (b"<HTML><head>", "is a web page"),
        (gzip.compress(b"weights", mtime=0), "is compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"epoch,top1\n1,0.1\n", "is no checkpoint; expected a PyTorch file"),
    ],
)
def test_files_that_are_something_else(tmp_path, contents, words):
    path = tmp_path / "file.pth.tar"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"file.pth.tar' {words}"):
        read(path)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"epoch": 3, "loss": 0.5}, "holds no weights, but a dict of 'epoch', 'loss'"),
        ([1, 2], "holds no weights, but a list"),
        (torch.ones(3), "holds no weights, but a Tensor"),
        ({}, "holds no weights, but a dict"),
    ],
)
def test_files_without_weights(tmp_path, contents, words):
    torch.save(contents, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "w.pth")


def test_a_dict_that_holds_itself(tmp_path):
    state = {"epoch": 3}
    state["model"] = {"state_dict": state}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights, but a dict of 'epoch', 'model'"):
        read(tmp_path / "w.pth")


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.pth")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


# ---- Into a network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    return create_model("se_cotnetd_50").eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """The network in the official layout, its weights as the average and others as the last."""
    path = tmp_path_factory.mktemp("weights") / "se_cotnetd_50.pth.tar"
    state = network.state_dict()
    torch.save(official({k: torch.zeros_like(v) for k, v in state.items()}, state), path)
    return path


@pytest.fixture
def remarks():
    """What was said, in the order in which it was."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("cotnet_ext")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def test_create_model_loads(network, file, remarks):
    loaded = create_model("se_cotnetd_50", checkpoint=file)
    assert same(loaded.state_dict(), network.state_dict())
    assert loaded.training
    assert same(
        create_model("se_cotnetd_50", reference=True, checkpoint=str(file)).state_dict(),
        network.state_dict(),
    )
    assert remarks == []


def test_a_classifier_for_other_classes_starts_random(network, file, remarks):
    loaded = create_model("se_cotnetd_50", num_classes=10, checkpoint=file)
    assert loaded.fc.weight.shape == (10, 2048)
    assert loaded.fc.weight.std() > 0
    assert torch.equal(loaded.layer4[2].bn3.weight, network.layer4[2].bn3.weight)
    assert remarks == [
        f"{str(file)!r} has a classifier for 1000 classes, so that for 10 starts random"
    ]
    create_model("se_cotnetd_50", num_classes=0, checkpoint=file)
    assert len(remarks) == 1


def test_a_backbone_without_classifier(network, tmp_path, remarks):
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pth")
    loaded = create_model("se_cotnetd_50", checkpoint=tmp_path / "backbone.pth")
    assert torch.equal(loaded.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    (remark,) = remarks
    assert remark.endswith("has no classifier, so that for 1000 starts random")


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_images(network, file, remarks, channels):
    loaded = create_model("se_cotnetd_50", in_chans=channels, checkpoint=file).conv1[0].weight
    official = network.conv1[0].weight
    # A grey image gives what it would have given as three equal channels.
    ones, grey = torch.ones(1, channels, 5, 5), torch.ones(1, 3, 5, 5)
    if channels == 1:
        expected = nn.functional.conv2d(grey, official)
    else:
        repeated = torch.cat([official, official], 1)[:, :channels] * 3 / channels
        expected = nn.functional.conv2d(ones, repeated)
    torch.testing.assert_close(nn.functional.conv2d(ones, loaded), expected)
    assert remarks == [
        f"{str(file)!r} is for images of 3 channels; "
        f"its first convolution was adapted to {channels}"
    ]


def test_a_network_for_maps(network, file, remarks):
    loaded = create_model("se_cotnetd_50", features_only=True, out_indices=(1, 2), checkpoint=file)
    images = torch.rand(1, 3, 32, 32)
    network_maps = network._maps(images)
    for index, actual in zip((1, 2), loaded.eval()(images), strict=True):
        torch.testing.assert_close(actual, network_maps[index])
    assert remarks == []


def test_counters_of_norms_may_be_absent(network, tmp_path):
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("tracked")}
    torch.save(state, tmp_path / "w.pth")
    create_model("se_cotnetd_50", checkpoint=tmp_path / "w.pth")


def test_a_wrong_file_names_the_first_differences(network, tmp_path):
    state = dict(network.state_dict())
    del state["layer1.0.bn3.bias"], state["layer2.0.bn3.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["layer3.0.conv1.weight"] = torch.zeros(7, 5)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        create_model("se_cotnetd_50", checkpoint=tmp_path / "w.pth")
    assert str(caught.value) == (
        f"{str(tmp_path / 'w.pth')!r} does not fit se_cotnetd_50: "
        "2 missing, first 'layer1.0.bn3.bias'; 1 unexpected, first 'extra.weight'; "
        "1 of another shape, first 'layer3.0.conv1.weight' is [7, 5], not [256, 512, 1, 1]"
    )


def test_half_a_classifier_is_missing(network, tmp_path):
    state = dict(network.state_dict())
    del state["fc.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="1 missing, first 'fc.bias'"):
        create_model("se_cotnetd_50", checkpoint=tmp_path / "w.pth")


def test_weights_of_another_network_say_of_which(file):
    with pytest.raises(CheckpointError, match="its blocks are those of se_cotnetd_50"):
        create_model("se_cotnetd_101", checkpoint=file)


def test_a_network_that_fails_to_load_is_as_before(network, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    before = model[0].weight.clone()
    torch.save({"0.weight": torch.ones(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="does not fit Sequential: 1 missing, first '0.bias'"):
        load_into(model, tmp_path / "w.pth")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["cotnet101", "cotnext50_2x48d", "se_cotnetd_152"])
def test_identify(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    assert name in identify(state)
    assert set(identify(state)) <= {name, f"{name}_L"}
    assert identify(STATE) == []


# ---- The command ---------------------------------------------------------------------------------


def test_convert(capsys, network, file, tmp_path):
    out = tmp_path / "out.safetensors"
    code, printed, err = run(capsys, "convert", str(file), str(out), "--model", "se_cotnetd_50")
    assert (code, err) == (0, "")
    assert "602 tensors" in printed
    assert "'state_dict_ema', a moving average" in printed
    assert "network  se_cotnetd_50\n" in printed
    assert f"wrote    {out}: {out.stat().st_size / 1e6:.1f} MB" in printed
    assert same(read(out).tensors, network.state_dict())
    from safetensors import safe_open

    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata == {"format": "pt", "part": "state_dict_ema", "model": "se_cotnetd_50"}


def test_convert_without_average(capsys, file, tmp_path):
    out = tmp_path / "out.safetensors"
    code, printed, _ = run(capsys, "convert", str(file), str(out), "--no-ema")
    assert code == 0
    assert "in 'state_dict'\n" in printed
    assert not any(value.any() for value in read(out).tensors.values())


def test_convert_of_other_networks_and_other_heads(capsys, tmp_path):
    path, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save(STATE, path)
    code, printed, _ = run(capsys, "convert", str(path), str(out))
    assert code == 0
    assert "network  none of cotnet_ext.models; written as it is" in printed
    assert same(read(out).tensors, STATE)
    state = create_model("se_cotnetd_50", num_classes=7, in_chans=1).state_dict()
    torch.save(state, path)
    code, printed, _ = run(capsys, "convert", str(path), str(out), "--model", "se_cotnetd_50")
    assert code == 0
    assert same(read(out).tensors, state)


def test_convert_refuses(capsys, file, tmp_path):
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"old")
    text = tmp_path / "notes.txt"
    text.write_text("no weights")
    taken = tmp_path / "taken"
    taken.mkdir()
    for arguments, words in (
        ((str(tmp_path / "none.pth"), str(old)), ("none.pth", "No such file")),
        ((str(tmp_path), str(old)), (str(tmp_path), "Is a directory")),
        ((str(text), str(old)), ("notes.txt' is no checkpoint",)),
        ((str(file), str(old), "--model", "cotnet_5"), ("'cotnet_5'", "'cotnet50'")),
        ((str(file), str(old), "--model", "cotnet50"), ("does not fit cotnet50", "missing")),
        ((str(file), str(tmp_path / "out.pth")), ("OUT must end in .safetensors", "out.pth")),
        ((str(file), str(tmp_path / "no" / "o.safetensors")), ("cannot write", "No such file")),
        ((str(file),), ("OUT",)),
    ):
        assert_refused(run(capsys, "convert", *arguments), *words)
    taken.rename(tmp_path / "taken.safetensors")
    refused = run(capsys, "convert", str(file), str(tmp_path / "taken.safetensors"))
    assert_refused(refused, "cannot write", "Is a directory")
    assert old.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "old.safetensors",
        "taken.safetensors",
    ]


def test_convert_needs_safetensors(capsys, monkeypatch, file, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused = run(capsys, "convert", str(file), str(tmp_path / "out.safetensors"))
    assert_refused(refused, "safetensors", 'pip install "cotnet_ext[models]"')
    with pytest.raises(ImportError, match=r"pip install \"cotnet_ext\[models\]\""):
        write(STATE, tmp_path / "out.safetensors")


def test_a_write_that_fails_leaves_the_old_file(monkeypatch, tmp_path):
    """As on a full disk: safetensors has an error of its own for that."""
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    safetensors = checkpoints._safetensors()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write(STATE, path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_number_is_no_classifier(network, tmp_path):
    state = network.state_dict() | {"fc.weight": torch.tensor(1.0)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"'fc.weight' is \[\], not \[\d+, 2048\]"):
        create_model("se_cotnetd_50", checkpoint=tmp_path / "w.pth")
