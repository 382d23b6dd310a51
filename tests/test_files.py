"""Writing files: the old one stays whole until the new one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from cpp_build import ROOT

from cotnet_ext._files import replacing


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_and_its_permissions(tmp_path):
    path = tmp_path / "new.bin"
    with replacing(path) as unfinished:
        assert unfinished.parent == path.parent
        assert unfinished.suffix == ".bin"
        assert not path.exists()
        unfinished.write_bytes(b"new")
    (tmp_path / "plain").write_bytes(b"")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == ["new.bin", "plain"]


def test_permissions_when_the_writer_brings_a_file_of_its_own(tmp_path):
    """As safetensors does: a private file that is renamed."""
    path, own = tmp_path / "new.bin", tmp_path / "own"
    with replacing(path) as unfinished:
        own.write_bytes(b"new")
        own.chmod(0o600)
        own.replace(unfinished)
    (tmp_path / "plain").write_bytes(b"")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "old.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as unfinished:
        unfinished.write_bytes(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["old.bin"]


def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "old.bin", tmp_path / "link.bin"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    with replacing(link) as unfinished:
        unfinished.write_bytes(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


KILLED = """
import sys, time
from cotnet_ext._files import replacing
with replacing(sys.argv[1]) as unfinished:
    unfinished.write_bytes(b"half")
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "old.bin"
    path.write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "error"),
    [("missing/file", FileNotFoundError), ("file/below", NotADirectoryError), ("", OSError)],
)
def test_what_cannot_be_written_is_said_first(tmp_path, name, error):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(error), replacing(tmp_path / name):
        pytest.fail("the work began")


def test_devices_are_not_replaced():
    with pytest.raises(OSError, match="not a regular file"), replacing(os.devnull):
        pytest.fail("the work began")
    assert not os.path.isfile(os.devnull)
