"""`cotnet-ext predict`: results, pictures, and one line for what cannot be done."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import assert_refused
from test_cli import run as run_cli
from test_prediction import picture

from cotnet_ext.models import create_model
from cotnet_ext.prediction import picture as pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights for three classes, their labels, two images and what looks like one."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    save_file(create_model("cotnet50", num_classes=3).state_dict(), folder / "w.safetensors")
    (folder / "labels.txt").write_text("cat\ndog [wolf]\nvery " + "long " * 20 + "name\n")
    (folder / "images").mkdir()
    picture(70, 60).save(folder / "images" / "one.png")
    picture(50, 90).save(folder / "images" / "two.jpg")
    (folder / "text.png").write_text("no image")
    data = (folder / "images" / "two.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture
def predict(folder, monkeypatch, capsys):
    """Runs the command with small images, in the folder."""
    monkeypatch.chdir(folder)

    def predict(*arguments: str, model="cotnet50", checkpoint="w.safetensors"):
        options = ("--model", model, "--checkpoint", checkpoint, "--size", "64")
        return run_cli(capsys, "predict", *options, *arguments)

    return predict


def test_a_table_of_the_likeliest_classes(predict):
    code, out, err = predict("images", "--labels", "labels.txt", "--top-k", "2")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["images/one.png", "2", "images/two.jpg", "2"]
    assert all("name" in row or "cat" in row or "[wolf]" in row for row in rows)
    assert "class" in out and "probability" in out


def test_json(predict):
    code, out, err = predict("images/one.png", "images/two.jpg", "--json", "--batch-size", "1")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["model"], result["checkpoint"]) == ("cotnet50", "w.safetensors")
    assert [entry["image"] for entry in result["images"]] == ["images/one.png", "images/two.jpg"]
    for entry in result["images"]:
        ranks = entry["predictions"]
        assert {rank["class"] for rank in ranks} == {0, 1, 2}
        assert {rank["label"] for rank in ranks} == {"class 0", "class 1", "class 2"}
        assert sum(rank["probability"] for rank in ranks) == pytest.approx(1)
        assert ranks == sorted(ranks, key=lambda rank: -rank["probability"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(predict, dtype):
    results = []
    for options in ((), ("--dtype", dtype)):
        code, out, err = predict("images/one.png", "--json", "--device", "cpu", *options)
        assert (code, err) == (0, "")
        (entry,) = json.loads(out)["images"]
        results.append({rank["class"]: rank["probability"] for rank in entry["predictions"]})
    assert results[0] == pytest.approx(results[1], abs=0.02)
    assert results[0] != results[1]


@pytest.mark.parametrize("name", ["out.png", "new folder/out.PDF"])
def test_a_picture_of_the_attention(predict, tmp_path, name):
    target = tmp_path / name
    code, out, err = predict(
        "images", "--visualize", str(target), "--layers", "layer3.0, layer4.*", "--top-k", "1"
    )
    assert (code, err) == (0, f"wrote {target}\n")
    assert out.count("%") == 2
    assert os.listdir(target.parent) == [target.name]
    if target.suffix == ".png":
        with Image.open(target) as image:
            image.load()
            # One column for the image and one per layer, two rows for each image.
            side = pictures.PANEL * 120
            assert image.width == pytest.approx(5 * side, abs=2)
            assert image.height == pytest.approx(4 * side + 132, abs=2)
            assert len(image.convert("RGB").getcolors(2**24)) > 1000
    else:
        assert target.read_bytes().startswith(b"%PDF")


def test_a_failing_picture_leaves_the_old_one(predict, tmp_path, monkeypatch):
    target = tmp_path / "out.png"
    target.write_text("old")

    def fail(self, path, **_):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    code, out, err = predict("images/one.png", "--visualize", str(target))
    assert code == 2
    assert "%" in out  # what was found out is not lost
    assert err == (
        f"cotnet-ext predict: error: --visualize: cannot write {str(target)!r}: "
        "No space left on device\n"
    )
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_bar_on_terminals_only(predict, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    code, _, err = predict("images", "--batch-size", "1")
    assert code == 0
    assert "2/2" in err


def test_damaged_images_are_named_after_the_results_of_the_others(predict):
    code, out, err = predict("half.jpg", "images/one.png", "half.jpg")
    assert code == 2
    assert "images/one.png" in out
    assert err.startswith("cotnet-ext predict: error: 'half.jpg' is damaged: image file is trunc")
    assert err.endswith("(and 1 more of 3 images)\n")
    assert err.count("\n") == 1
    assert_refused(predict("half.jpg", "--json", "--visualize", "unused.png"), "half.jpg")
    assert not os.path.exists("unused.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.png",), ("cannot read 'missing.png': No such file",)),
        (("text.png",), ("'text.png' is no image that Pillow can read",)),
        (("images", "text.png"), ("'text.png' is no image",)),
        (("images/one.png", "--labels", "none.txt"), ("--labels: cannot read 'none.txt'",)),
        (("images/one.png", "--labels", "half.jpg"), ("--labels", "is no text in UTF-8")),
        (("images/one.png", "--labels", "text.png"), ("has 1 names, expected 3",)),
        (("images/one.png", "--top-k", "0"), ("--top-k", ">= 1")),
        (("images/one.png", "--batch-size", "x"), ("--batch-size", "'x'")),
        (("images/one.png", "--size", "8"), ("--size", ">= 32")),
        (("images/one.png", "--dtype", "int8"), ("--dtype", "'int8'", "float32")),
        (("images/one.png", "--device", "tpu"), ("--device: expected cpu, cuda", "'tpu'")),
        (("images/one.png", "--device", "mps"), ("--device: expected cpu, cuda", "'mps'")),
        (("images/one.png", "--layers", "layer1.0"), ("--layers needs --visualize",)),
        (("images/one.png", "--visualize", "o.xyz"), ("'o.xyz' has to end in one of", ".png")),
        (("images/one.png", "--visualize", "text.png/o.png"), ("--visualize: cannot write to",)),
        (
            ("images/one.png", "--visualize", "o.png", "--layers", "layer9"),
            ("--layers: no contextual layer is named 'layer9'; did you mean",),
        ),
        (
            ("images/one.png", "--visualize", "o.png", "--layers", " , "),
            ("--layers: expected names separated by commas",),
        ),
    ],
)
def test_what_cannot_be_done(predict, arguments, words):
    assert_refused(predict(*arguments), *words)


def test_bad_models_and_checkpoints(predict, folder):
    assert_refused(
        predict("images", model="cotnet5"), "--model: no model is named 'cotnet5'", "'cotnet50'"
    )
    assert_refused(
        predict("images", checkpoint="none.pth"),
        "--checkpoint: cannot read 'none.pth': No such file or directory",
    )
    assert_refused(predict("images", checkpoint="images"), "--checkpoint: cannot read 'images'")
    assert_refused(predict("images", checkpoint="text.png"), "--checkpoint: 'text.png' is no check")
    assert_refused(
        predict("images", model="cotnet101"),
        "--checkpoint: ",
        "does not fit cotnet101",
        "of cotnet50",
    )


def test_folders_cannot_be_drawn_to(predict, tmp_path):
    (tmp_path / "taken.png").mkdir()
    assert_refused(
        predict("images", "--visualize", str(tmp_path / "taken.png")), "taken.png' is a folder"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_devices_that_are_not_there(predict):
    assert_refused(predict("images", "--device", "cuda"), "--device: ")


def test_arguments_that_are_needed(capsys):
    refused = run_cli(capsys, "predict", "image.png", "--model", "cotnet50")
    assert_refused(refused, "--checkpoint")
    assert_refused(run_cli(capsys, "predict", "--model", "x", "--checkpoint", "y"), "IMAGE")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("PIL", "pillow", "models"),
        ("rich", "rich", "models"),
        ("safetensors", "safetensors", "models"),
        ("matplotlib", "matplotlib", "demo"),
    ],
)
def test_missing_packages_are_named(predict, monkeypatch, module, package, extra):
    monkeypatch.setitem(sys.modules, module, None)
    refused = predict("images", "--visualize", "unused.png")
    assert_refused(refused, package, f'pip install "cotnet_ext[{extra}]"')


def test_numbers_that_are_not_finite(predict, folder):
    tensors = load_file(folder / "w.safetensors")
    tensors["fc.bias"][0] = 1e5
    save_file(tensors, folder / "large.safetensors")
    refused = predict("images/one.png", "--dtype", "float16", checkpoint="large.safetensors")
    assert_refused(refused, "not finite, torch.float16; try --dtype bfloat16 or float32")
