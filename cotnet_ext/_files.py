"""Files that are there whole or as they were before, never half written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to; what stands there in the end takes its place.

        with replacing("weights.safetensors") as unfinished:
            save_file(tensors, unfinished)

    The unfinished file has the ending of `path`. If the block fails, or the process is killed in
    it, `path` is what it was; after the block it is the new file, on the disk. A link keeps
    pointing where it did, an existing file keeps its permissions, and a new one has those of any
    new file, whatever the writer does.

    Raises:
        OSError: the folder is missing or cannot be written to, or `path` is a folder or a device;
            raised before the block runs.
    """
    target = Path(os.path.realpath(path))  # a link is followed, not replaced
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    name = f".{target.stem[:100]}.{secrets.token_hex(4)}.unfinished{target.suffix}"
    unfinished = target.with_name(name)
    with open(unfinished, "xb"):  # whether it can be written, and the permissions of a new file
        pass
    try:
        permissions = (target if target.exists() else unfinished).stat().st_mode & 0o777
        yield unfinished
        unfinished.chmod(permissions)  # some writers bring a file with others: safetensors
        _flush(unfinished)
        os.replace(unfinished, target)
        with contextlib.suppress(OSError):  # not every file system knows this of folders
            _flush(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Sends what was written to the disk, so that a rename never outruns the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
