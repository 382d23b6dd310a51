"""The console script: help, exit codes, one clear line for what cannot be done."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest

import cotnet_ext
from cotnet_ext import cli


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `cotnet-ext` with these arguments."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, and one line on stderr that has all these words."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("cotnet-ext")
    for word in words:
        assert word in err


def test_the_installed_script_is_this_one():
    (script,) = metadata.entry_points(group="console_scripts", name="cotnet-ext")
    assert script.load() is cli.main


def test_help_lists_the_commands(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for command in cli.COMMANDS:
        assert command.name in out


def test_version(capsys):
    expected = f"cotnet-ext {cotnet_ext.build_info()['version']}\n"
    assert run(capsys, "--version") == (0, expected, "")


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_command_has_help(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: cotnet-ext {command}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("command", "cotnet-ext --help")),
        (("fly",), ("fly", "info", "demo")),
        (("--fast",), ("command",)),
        (("info", "--fast"), ("--fast",)),
        (("info", "more"), ("more",)),
        (("demo", "--epochs", "0"), ("--epochs", ">= 1", "'0'")),
        (("demo", "--epochs", "many"), ("--epochs", "'many'")),
        (("demo", "--threads", "-3"), ("--threads",)),
        (("demo", "--seed", "1.5"), ("--seed", "'1.5'")),
        (("demo", "--seed", "4294967296"), ("--seed", "<= 4294967295")),
        (("demo", "--out"), ("--out",)),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, words):
    assert_refused(run(capsys, *arguments), *words)


def test_output_folder_must_be_writable(capsys, tmp_path):
    file = tmp_path / "taken"
    file.write_text("not a folder")
    assert_refused(run(capsys, "demo", "--out", str(file)), "demo", "--out", str(file))
    below = str(file / "below")
    assert_refused(run(capsys, "demo", "--out", below), "--out", below)


@pytest.mark.parametrize(
    ("module", "package"),
    [("matplotlib", "matplotlib"), ("rich", "rich"), ("sklearn", "scikit-learn")],
)
def test_missing_packages_are_named(capsys, monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "out"
    refused = run(capsys, "demo", "--out", str(out))
    assert_refused(refused, package, 'pip install "cotnet_ext[demo]"')
    assert not out.exists()


def test_info_shows_the_build(capsys):
    import torch

    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    build = cotnet_ext.build_info()
    assert cotnet_ext.__version__ in out
    assert torch.__version__ in out
    assert build["cpu_capability"] in out
    assert build["compiler"] in out
    assert ("COTNET_EXT_CUDA=1" in out) is not build["cuda"]


def test_info_in_json(capsys):
    import torch

    code, out, err = run(capsys, "info", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert {name: facts[name] for name in cotnet_ext.build_info()} == cotnet_ext.build_info()


@pytest.mark.parametrize(("succeeds", "code"), [(True, 0), (False, 1)])
def test_demo_fails_when_its_checks_do(capsys, monkeypatch, tmp_path, succeeds, code):
    from cotnet_ext.demo import run as demo

    asked = []
    monkeypatch.setattr(demo, "run", lambda options: asked.append(options) or succeeds)
    arguments = ["--seed", "7", "--epochs", "2", "--threads", "1", "--quick"]
    assert run(capsys, "demo", "--out", str(tmp_path / "a" / "b"), *arguments)[0] == code
    assert asked == [
        demo.Options(out=tmp_path / "a" / "b", seed=7, epochs=2, quick=True, threads=1)
    ]
    assert (tmp_path / "a" / "b").is_dir()


def test_interruption_leaves_no_traceback(capsys, monkeypatch, tmp_path):
    from cotnet_ext.demo import run as demo

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    code, _, err = run(capsys, "demo", "--out", str(tmp_path))
    assert code == 130
    assert err == "cotnet-ext demo: interrupted\n"


def test_as_a_process():
    """Exit codes and streams of a real process, as a shell sees them."""
    command = [sys.executable, "-m", "cotnet_ext.cli"]
    good = subprocess.run([*command, "info", "--json"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["version"] == cotnet_ext.__version__
    bad = subprocess.run([*command, "fly"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1
