"""What examples/train.py takes, and that it refuses the rest with one line and leaves nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from documents import environment
from training import main
from training.distributed import World
from training.options import FIELDS, Options, check, parse
from training_runs import CONFIGS, EXAMPLES, SHORT, flags, make_pictures, train

from cotnet_ext.cli.command import UsageError

RECIPES = sorted(CONFIGS.glob("*.yaml"))


def refusal(capsys, *arguments: str) -> str:
    """The one line with which these arguments are refused."""
    capsys.readouterr()
    assert main.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("train.py: error: ") and printed.err.count("\n") == 1
    return printed.err


# ---- Configuration files -------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_configurations_are_whole(path):
    options = parse(["--config", str(path)])
    check(options)
    said = yaml.safe_load(path.read_text())
    assert options.model == ("digitnet" if path.stem == "digits" else path.stem)
    for key, value in said.items():
        value = tuple(value) if isinstance(value, list) else value
        assert getattr(options, key) == value, key


# Of cot_experiments/*/config.yaml of JDAI-CV/CoTNet: lr, images per GPU, decay, drop path.
OFFICIAL = {
    "cotnet50": (0.25, 80, 4e-5, 0.1),
    "cotnet101": (0.175, 56, 6e-5, 0.1),
    "cotnext50_2x48d": (0.2, 64, 4e-5, 0.1),
    "cotnext101_2x48d": (0.2, 64, 6e-5, 0.1),
    "se_cotnetd_50": (0.25, 80, 4e-5, 0.1),
    "se_cotnetd_101": (0.2, 64, 4e-5, 0.1),
    "se_cotnetd_152": (0.2, 64, 4e-5, 0.15),
}
IN_COMMON = {
    "epochs": 350, "opt": "sgd", "momentum": 0.9, "warmup_epochs": 5, "warmup_lr": 1e-4,
    "min_lr": 1e-5, "drop": 0.25, "ema": True, "ema_decay": 0.9999, "mixup": 0.8, "cutmix": 1.0,
    "smoothing": 0.1, "aa": "rand-m15-mstd0.5-n2", "color_jitter": 0.4, "reprob": 0.0,
    "hflip": 0.5, "scale": (0.08, 1.0), "num_classes": 1000, "amp": "none", "sync_bn": False,
}  # fmt: skip


def test_there_is_one_configuration_per_official_recipe():
    assert {path.stem for path in RECIPES} == {"digits", *OFFICIAL}


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipes_have_the_official_values(name):
    options = parse(["--config", str(CONFIGS / f"{name}.yaml")])
    rate, batch, decay, drop_path = OFFICIAL[name]
    assert (options.lr, options.batch_size, options.base_batch) == (rate, batch, 8 * batch)
    assert (options.weight_decay, options.drop_path) == (decay, drop_path)
    assert {key: getattr(options, key) for key in IN_COMMON} == IN_COMMON


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("lr: 1e-3\nepochs: 7\nema: true\nscale: [0.2, 0.9]\naa: null\n")
    options = parse(["--config", str(path), "--epochs", "9", "--no-ema", "--aa", "rand-m9"])
    assert (options.lr, options.epochs, options.ema, options.aa) == (1e-3, 9, False, "rand-m9")
    assert options.scale == (0.2, 0.9)
    assert options.seed == Options().seed


def test_flags_say_what_options_say():
    odd = dataclasses.replace(
        SHORT, ema=True, scale=(0.25, 1.0), clip_grad=2.5, compile="eager", lr=1e-5
    )
    assert parse(flags(odd)) == odd
    assert parse(["--compile"]).compile == "inductor"
    assert parse(["--clip-grad", "none"]).clip_grad is None


def test_help_has_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in FIELDS:
        assert "--" + name.replace("_", "-") in out


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weight-dekay", "1"), ("'--weight-dekay'", "--weight-decay?")),
        (("--epoch", "3"), ("'--epoch'", "--epochs?")),
        (("digits",), ("'digits'",)),
        (("--epochs", "0"), ("--epochs", ">= 1", "'0'")),
        (("--lr", "fast"), ("--lr", "a number >= 0", "'fast'")),
        (("--lr", "nan"), ("--lr", "'nan'")),
        (("--mixup-prob", "1.5"), ("--mixup-prob", "<= 1")),
        (("--scale", "0.9,0.1"), ("--scale", "LEAST,MOST", "'0.9,0.1'")),
        (("--amp", "half"), ("--amp", "bfloat16", "'half'")),
        (("--layer", "Cot"), ("--layer", "CoXtLayer", "'Cot'")),
        (("--batch-size", "7", "--mixup", "0.2"), ("--batch-size", "pairs", "7")),
        (("--warmup-epochs", "9", "--epochs", "8"), ("--warmup-epochs", "8 epochs")),
        (("--aa", "rand-m9"), ("--aa", "digits")),
        (("--width", "20"), ("--width", "multiple of 8", "20")),
        (("--checkpoint", "some.pt"), ("--checkpoint", "digitnet")),
        (("--drop-path", "0.1"), ("--drop-path", "digitnet")),
        (("--num-classes", "7"), ("--num-classes", "10", "7")),
        (("--batch-size", "4000"), ("--data", "too few", "4000")),
        (("--accumulate", "99"), ("--accumulate", "22", "99")),
        (("--opt", "stg"), ("--opt", "stg")),
        (("--model", "cotnet5"), ("--model", "'cotnet5'", "cotnet50", "digitnet")),
        (("--config", "absent.yaml"), ("--config", "'absent.yaml'", "No such file")),
    ],
)
def test_bad_arguments_are_refused(capsys, tmp_path, arguments, words):
    out = tmp_path / "out"
    error = refusal(capsys, "--no-tensorboard", "--out", str(out), *arguments)
    for word in words:
        assert word in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epohs: 3", ("'epohs'", "'epochs'")),
        ("momentun: 0.9", ("'momentun'", "'momentum'")),
        ("epochs: many", ("epochs", ">= 1", "'many'")),
        ("ema: 1", ("ema", "true or false", "1")),
        ("- epochs", ("option: value",)),
        ("a: [", ("no YAML",)),
    ],
)
def test_bad_configurations_are_refused(capsys, tmp_path, text, words):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    error = refusal(capsys, "--config", str(path), "--out", str(tmp_path / "out"))
    for word in ("some.yaml", *words):
        assert word in error
    assert not (tmp_path / "out").exists()


def _spoil(data: Path, what: str) -> None:
    if what == "no train":
        (data / "train").rename(data / "trian")
    elif what == "no val":
        (data / "val").rename(data / "evaluation")
    elif what == "no classes":
        for part in list((data / "train").iterdir()):
            part.rename(data / part.name)
    elif what == "empty class":
        for image in (data / "train" / "red").iterdir():
            image.rename(image.with_suffix(".txt"))
    elif what == "other classes":
        (data / "val" / "red").rename(data / "val" / "green")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no train", ("no folder 'train'", "train/CLASS/IMAGE")),
        ("no val", ("no folder 'val'", "val/CLASS/IMAGE")),
        ("no classes", ("no class folders", "train")),
        ("empty class", ("no images in these classes", "train", "red")),
        ("other classes", ("different classes", "green, red")),
        ("wrong folder", ("there is no folder",)),
    ],
)
def test_bad_folders_are_refused(capsys, tmp_path, what, words):
    data = make_pictures(tmp_path / "data", train=1, test=1)
    _spoil(data, what)
    where = str(tmp_path / "date" if what == "wrong folder" else data)
    error = refusal(capsys, "--no-tensorboard", "--data", where, "--out", str(tmp_path / "out"))
    for word in ("--data", where, *words):
        assert word in error
    assert not (tmp_path / "out").exists()


def test_validation_is_a_name_for_val(tmp_path):
    from training.folder import find_folders

    data = make_pictures(tmp_path / "data", train=1, test=1)
    (data / "val").rename(data / "validation")
    folders = find_folders(str(data))
    assert folders.test == data / "validation"
    assert folders.classes == {"blue": 0, "red": 1}


def test_a_training_is_not_overwritten(capsys, tmp_path):
    train(tmp_path, epochs=1)
    before = (tmp_path / "last.pt").read_bytes()
    said = flags(dataclasses.replace(SHORT, out=str(tmp_path), epochs=1))
    error = refusal(capsys, *said)
    assert "--resume" in error and "last.pt" in error
    for option, value in (("--layer", "CoXtLayer"), ("--width", "32"), ("--opt", "adamw")):
        error = refusal(capsys, *said, "--resume", option, value)
        assert option in error and value in error and "last.pt" in error
    assert (tmp_path / "last.pt").read_bytes() == before


def test_processes_must_see_the_same_folder(tmp_path):
    """As on machines that share no file system: one of them has a checkpoint, the other none."""

    class Apart(World):
        def gather(self, value):
            return [value, 3]

    with pytest.raises(UsageError, match="--out: .* is not the same folder for all processes"):
        main.train(dataclasses.replace(SHORT, out=str(tmp_path / "out")), Apart())
    assert not (tmp_path / "out").exists()


def test_another_number_of_processes_is_said(capsys, tmp_path):
    train(tmp_path, epochs=1)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["random_states"] *= 2
    torch.save(saved, tmp_path / "last.pt")
    train(tmp_path, epochs=1, resume=True)
    assert "note: 2 processes before, 1 now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "may be damaged ("),
        ("half a pickle", "move it away to begin anew"),
        ("not all of it", "is no checkpoint of a training"),
        ("foreign", "is no checkpoint of a training"),
        ("weights of another", "head.weight"),
    ],
)
def test_bad_checkpoints_are_refused(capsys, tmp_path, what, words):
    train(tmp_path, epochs=1)
    path = tmp_path / "last.pt"
    if what == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif what == "half a pickle":
        path.write_bytes(b"\x80\x02.")
    elif what == "not all of it":
        torch.save({"state_dict": {}, "random_states": []}, path)
    elif what == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        content = torch.load(path, weights_only=True)
        content["state_dict"].pop("head.weight")
        torch.save(content, path)
    before = path.read_bytes()
    error = refusal(
        capsys, *flags(dataclasses.replace(SHORT, out=str(tmp_path), epochs=2, resume=True))
    )
    assert "--resume" in error and "last.pt" in error and words in error
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("--checkpoint", "No such file", "absent.pt")),
        (b"text", ("absent.pt",)),
        ({"state_dict": {"head.weight": torch.zeros(2, 3)}}, ("absent.pt",)),
    ],
    ids=["missing", "no checkpoint", "of another network"],
)
def test_bad_weights_to_start_from_are_refused(capsys, tmp_path, content, words):
    path = tmp_path / "absent.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    data = make_pictures(tmp_path / "data", train=1, test=1)
    error = refusal(
        capsys, "--no-tensorboard", "--out", str(tmp_path / "out"), "--batch-size", "2",
        "--data", str(data), "--model", "cotnet50", "--checkpoint", str(path),
    )  # fmt: skip
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_a_network_starts_from_trained_weights(tmp_path):
    """From another number of classes: all but the classifier is taken over."""
    from training.model import build

    from cotnet_ext import models

    torch.manual_seed(1)
    trained = models.create_model("cotnet50", num_classes=3)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "some.pt")
    options = dataclasses.replace(SHORT, model="cotnet50", checkpoint=str(tmp_path / "some.pt"))
    network = build(options, classes=2, channels=3)
    assert network.state_dict()["fc.weight"].shape[0] == 2
    assert torch.equal(network.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)


def test_output_must_be_writable(capsys, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("not a folder")
    assert "--out" in refusal(capsys, "--no-tensorboard", "--out", str(taken / "below"))


@pytest.mark.parametrize(
    ("module", "package"), [("timm", "timm"), ("tensorboard", "tensorboard"), ("rich", "rich")]
)
def test_missing_packages_are_named(capsys, monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(capsys, "--out", str(tmp_path / "out"))
    assert package in error and 'pip install "cotnet_ext[train]"' in error


def test_a_configuration_needs_yaml(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    error = refusal(capsys, "--config", str(RECIPES[0]))
    assert 'needs yaml; install with: pip install "cotnet_ext[train]"' in error


def test_a_gpu_that_is_not_there_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    error = refusal(capsys, "--device", "cuda", "--no-tensorboard", "--out", str(tmp_path / "out"))
    assert "--device cuda" in error and "there are 0" in error


def test_as_a_process(tmp_path):
    """Exit code and streams as a shell sees them."""
    bad = subprocess.run(
        [sys.executable, str(EXAMPLES / "train.py"), "--data", str(tmp_path / "absent")],
        env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1 and "there is no folder" in bad.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".programs"]
