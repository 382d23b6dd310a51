"""`cotnet-ext export`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from exporting import TENSORRT, operators
from test_cli import assert_refused, run

from cotnet_ext.models import create_model, table


@pytest.fixture
def small(monkeypatch):
    """`cotnet50` with one block in each stage."""
    variant = dataclasses.replace(table.VARIANTS["cotnet50"], blocks=(1, 1, 1, 1))
    monkeypatch.setitem(table.VARIANTS, "cotnet50", variant)


def export(capsys, path, *options: str) -> tuple[int, str, str]:
    """The command for a network of ten classes."""
    chosen = ("--model", "cotnet50", "--num-classes", "10", "--size", "64", "--out", str(path))
    return run(capsys, "export", *chosen, *options)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def test_onnx(capsys, tmp_path, small):
    path = tmp_path / "new folder" / "network.onnx"
    code, out, err = export(capsys, path, "--format", "onnx", "--dynamic", "all")
    assert (code, err) == (0, "")
    assert "float32 images [batch, 3, height, width] to logits [batch, 10]" in out
    assert "results differ from the network's by " in out
    assert set(operators(path)) <= TENSORRT - {"Transpose", "Cast", "Shape"}
    assert [entry.name for entry in path.parent.iterdir()] == ["network.onnx"]


def test_onnx_in_float16(capsys, tmp_path, small):
    path = tmp_path / "network.onnx"
    code, out, err = export(capsys, path, "--format", "onnx", "--dtype", "float16")
    assert (code, err) == (0, "")
    assert "float16 images [batch, 3, 64, 64] to logits [batch, 10]" in out
    assert set(operators(path)) <= TENSORRT - {"Transpose", "Cast", "Shape"}


def test_program_with_the_weights_of_a_checkpoint(capsys, tmp_path, small):
    path, checkpoint = tmp_path / "network.pt2", tmp_path / "weights.pth"
    torch.manual_seed(1)
    network = create_model("cotnet50", num_classes=10).eval()
    torch.save(network.state_dict(), checkpoint)
    options = ("--format", "pt2", "--checkpoint", str(checkpoint), "--dynamic", "none")
    code, out, err = export(capsys, path, *options, "--batch", "3")
    assert (code, err) == (0, "")
    assert "float32 images [3, 3, 64, 64] to logits [3, 10]" in out
    x = images(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(x), network(x))


def test_checkpoint_of_another_network(capsys, tmp_path, small):
    path, checkpoint = tmp_path / "network.pt2", tmp_path / "weights.pth"
    torch.save(create_model("cotnext50_2x48d", num_classes=10).state_dict(), checkpoint)
    refused = export(capsys, path, "--format", "pt2", "--checkpoint", str(checkpoint))
    assert_refused(refused, "export", str(checkpoint))
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "tflite"), ("--format", "tflite", "onnx", "pt2", "aoti")),
        (("--format", "onnx", "--opset", "12"), ("--opset", "from 18 to", "got 12")),
        (("--format", "onnx", "--opset", "99"), ("--opset", "got 99")),
        (
            ("--format", "onnx", "--opset", "18", "--dtype", "bfloat16"),
            ("--opset of a model in bfloat16", "from 22 to", "got 18"),
        ),
        (("--format", "pt2", "--opset", "18"), ("--opset", "pt2", "has none")),
        (("--format", "onnx", "--decompose"), ("--decompose", "ONNX")),
        (("--format", "pt2", "--model", "cotnet51"), ("cotnet51", "cotnet50")),
        (("--format", "pt2", "--checkpoint", "no.pth"), ("no.pth",)),
        (("--format", "pt2", "--dtype", "int8"), ("--dtype", "int8", "float16")),
        (("--format", "pt2", "--size", "8"), ("--size", ">= 32")),
        (("--format", "pt2", "--batch", "0"), ("--batch", ">= 1")),
        (("--format", "pt2", "--dynamic", "some"), ("--dynamic", "some", "batch")),
        ((), ("--format",)),
    ],
)
def test_bad_arguments_are_refused(capsys, tmp_path, options, words):
    path = tmp_path / ("network.onnx" if "onnx" in options else "network.pt2")
    assert_refused(export(capsys, path, *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_output_must_be_a_file_with_the_ending_of_its_format(capsys, tmp_path):
    for name, kind, suffix in (("n.pt2", "onnx", ".onnx"), ("n.onnx", "aoti", ".pt2")):
        refused = export(capsys, tmp_path / name, "--format", kind)
        assert_refused(refused, "--out", kind, suffix, name)
    (tmp_path / "folder.pt2").mkdir()
    refused = export(capsys, tmp_path / "folder.pt2", "--format", "pt2")
    assert_refused(refused, "--out", "folder.pt2", "is a folder")
    (tmp_path / "file").touch()
    refused = export(capsys, tmp_path / "file" / "network.pt2", "--format", "pt2")
    assert_refused(refused, "--out", "cannot write")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(capsys, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused = export(capsys, tmp_path / "network.onnx", "--format", "onnx")
    assert_refused(refused, package, 'pip install "cotnet_ext[export]"')
    assert list(tmp_path.iterdir()) == []


def test_missing_compiler_is_named(capsys, monkeypatch, tmp_path):
    from torch._inductor import cpp_builder, exc

    def search(*_):
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", search)
    refused = export(capsys, tmp_path / "network.pt2", "--format", "aoti")
    assert_refused(refused, "--format aoti", "C++ compiler", "CXX")


def test_what_differs_is_a_failure(capsys, monkeypatch, tmp_path, small):
    from cotnet_ext.export import _program

    path = tmp_path / "network.pt2"
    monkeypatch.setitem(_program.TOLERANCE, torch.float32, -1.0)
    code, _, err = export(capsys, path, "--format", "pt2")
    assert code == 1
    assert err.startswith("cotnet-ext export: output 0 of the program is ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up(capsys, monkeypatch, tmp_path, small):
    from cotnet_ext.export import _program

    def fill(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(_program.shutil, "copyfile", fill)
    refused = export(capsys, tmp_path / "network.pt2", "--format", "pt2")
    code, _, err = refused
    assert code == 2
    assert "--out: cannot write" in err and "No space left on device" in err
    assert list(tmp_path.iterdir()) == []
