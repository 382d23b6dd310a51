"""Image files as the tensors that a network was evaluated on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models import Variant

# What is taken of a folder; a file that is named is opened whatever its name.
SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Longer sides than so many shorter ones would become maps of gigabytes.
_MOST_NARROW = 100


class ImageError(ValueError):
    """A file is no image that can be read; the message names it and says why."""


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the input of a network in evaluation.

    The shorter side is resized to `size / crop_pct`, the middle `size` x `size` cut out, and the
    colours, 0 to 1, normalised with `mean` and `std`: the numbers of timm's evaluation transform.
    Pictures that carry their orientation are turned upright first, 16-bit greys are scaled.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, variant: Variant, size: int | None = None) -> Preparation:
        """That of a network of the table, with the images of another size if given."""
        return cls(
            size or variant.input_size[1],
            variant.crop_pct,
            variant.interpolation,
            variant.mean,
            variant.std,
        )

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """The prepared image `[3, size, size]`, float32; an `ImageError` if there is none."""
        from PIL import Image, ImageOps

        with _reading(path), Image.open(path) as image:
            if max(image.size) > _MOST_NARROW * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value / 256, "L")
            return self._prepare(ImageOps.exif_transpose(image).convert("RGB"))

    def _prepare(self, image) -> Tensor:
        from PIL import Image

        short, size = math.floor(self.size / self.crop_pct), self.size
        width, height = image.size
        if width <= height:
            width, height = short, int(short * height / width)
        else:
            width, height = int(short * width / height), short
        filters = Image.Resampling
        image = image.resize((width, height), filters[self.interpolation.upper()])
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return self._normalise(pixels.view(size, size, 3).permute(2, 0, 1).contiguous() / 255)

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def restore(self, image: Tensor) -> Tensor:
        """The picture `[H, W, 3]`, 0 to 1, that a prepared image shows."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1).permute(1, 2, 0)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files among `paths`, and all images in the folders among them, in order of their names.

    Raises:
        ImageError: one is missing, a folder without images, or a file whose head is no image's.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            inside = sorted(p for p in files if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise ImageError(f"{str(path)!r} has no images ({', '.join(sorted(SUFFIXES))})")
            found += inside
        else:
            check_image(path)
            found.append(path)
    return found


def check_image(path: str | os.PathLike[str]) -> None:
    """Raises an `ImageError` unless the file begins as an image; its pixels are not read."""
    from PIL import Image

    with _reading(path), Image.open(path):
        pass


class _reading:
    """Turns what Pillow raises for a file into an `ImageError`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = repr(str(path))
        self.quiet = warnings.catch_warnings()

    def __enter__(self) -> None:
        self.quiet.__enter__()
        warnings.simplefilter("ignore")  # remarks on metadata; what matters raises

    def __exit__(self, kind, error, trace) -> None:
        from PIL import Image, UnidentifiedImageError

        self.quiet.__exit__(kind, error, trace)
        if isinstance(error, UnidentifiedImageError):
            raise ImageError(f"{self.name} is no image that Pillow can read") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"cannot read {self.name}: {error.strerror}") from None
        if isinstance(error, (OSError, SyntaxError, ValueError, EOFError)):
            raise ImageError(f"{self.name} is damaged: {error}") from None
        if isinstance(error, Image.DecompressionBombError):
            raise ImageError(f"{self.name} is too large: {error}") from None
