"""A folder of images in the layout of ImageNet, looked over before anything starts.

DATA/train/CLASS/*.jpg    DATA/val/CLASS/*.jpg    (or DATA/validation)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cotnet_ext.cli.command import UsageError

TEST_NAMES = ("val", "validation")


@dataclass(frozen=True)
class Folders:
    """The folders of both parts, and the number of each class, in the order of their names."""

    train: Path
    test: Path
    classes: dict[str, int]


def find_folders(data: str) -> Folders:
    """Both parts of the data; a `UsageError` that says what is wrong with them."""
    root = Path(data)
    if not root.is_dir():
        raise UsageError(f"--data: there is no folder {data!r}")
    train, test = root / "train", root / TEST_NAMES[0]
    if not test.is_dir() and (root / TEST_NAMES[1]).is_dir():
        test = root / TEST_NAMES[1]
    for part in (train, test):
        if not part.is_dir():
            raise UsageError(
                f"--data: {data!r} has no folder {part.name!r}; expected "
                f"{part.name}/CLASS/IMAGE in it"
            )
    names, tested = _classes(train), _classes(test)
    if names != tested:
        odd = sorted(set(names) ^ set(tested))
        raise UsageError(
            f"--data: {str(train)!r} and {str(test)!r} have different classes: {_few(odd)}"
        )
    return Folders(train, test, {name: number for number, name in enumerate(names)})


def _classes(part: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir())
    if not names:
        raise UsageError(f"--data: {str(part)!r} has no class folders; expected CLASS/IMAGE in it")
    empty = [name for name in names if not _has_image(part / name)]
    if empty:
        raise UsageError(f"--data: no images in these classes of {str(part)!r}: {_few(empty)}")
    return names


def _has_image(folder: Path) -> bool:
    from timm.data.readers.img_extensions import get_img_extensions

    suffixes = get_img_extensions(as_set=True)
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in suffixes for entry in entries)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
