"""Maps for the emulated CUDA kernels of `spatial_softmax_gate` and `context_fusion`: dense NumPy
arrays in either layout, aligned or not, and GPUs small enough to need every way of launching.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import CASES, Case, dtype_id
from cpp_build import cmake_build
from tolerances import DTYPES

# Names the folder of a module that is built already, with sanitizers perhaps.
MODULE_FOLDER = "COTNET_CUDA_EMULATED"
TARGET = "cotnet_cuda_emulated"

# (multiprocessors, compute capability times 10, largest shared memory of a block)
H200 = (132, 90, 232448)
A100 = (108, 80, 166912)
TURING = (40, 75, 65536)
# For small maps: a block that holds all of a row, or a part, and several blocks for each row.
SINGLE = (1, 90, 232448)
SMALL = (1, 90, 48 << 10)
WIDE = (64, 90, 232448)
GPUS = {
    "H200": H200,
    "A100": A100,
    "Turing": TURING,
    "single": SINGLE,
    "small": SMALL,
    "wide": WIDE,
}

LAST = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
ALL = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
TWO = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)

# NumPy has no bfloat16: arrays hold bits, whatever the dtype.
_BITS = {8: np.int64, 4: np.int32, 2: np.int16}
_TORCH_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shaped(name: str, batch: int, channels: int, height: int, width: int) -> Case:
    """A case of maps alone."""
    plain = CASES["one_channel"]
    return replace(plain, name=name, batch=batch, channels=channels, height=height, width=width)


# Beside the common table: rows longer than a tile, of every remainder; vectors of channels that
# fill a slab of 128 bytes and more, exactly and not.
ROWS = (
    shaped("rows_2x96x97", 1, 2, 96, 97),
    shaped("rows_3x100x80", 1, 3, 100, 80),
    shaped("rows_1x7x1301", 1, 1, 7, 1301),
)
SLABS = (
    shaped("slab_64x13x11", 1, 64, 13, 11),
    shaped("slab_136x7x7", 1, 136, 7, 7),
    shaped("slab_40x24x25", 1, 40, 24, 25),
    shaped("slab_6x33x31", 2, 6, 33, 31),
)
SHORT = tuple(
    CASES[name]
    for name in (
        "odd_9x11",
        "odd_17x13",
        "map_1x1",
        "row_1x19",
        "narrow_10x3",
        "narrow_6x2_k5",
        "long_5x130",
        "long_3x257_k5",
        "one_slice_40x33",
        "one_channel",
        "batch_33",
        "tiny_k3",
    )
) + (shaped("stage3_24x14x14", 2, 24, 14, 14), shaped("stage4_70x7x7", 2, 70, 7, 7))


def problem(case: Case, channels_last: bool) -> tuple[int, int, int, bool]:
    return case.batch, case.channels, case.height * case.width, channels_last


def place(raw: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins `offset` elements past an aligned address and ends where its memory ends,
    so that AddressSanitizer sees the first element past it."""
    room = np.empty(offset + raw.size, raw.dtype)
    assert room.ctypes.data % 16 == 0
    room[:offset] = -1
    room[offset:] = raw
    return room[offset:]


def array_of(t: torch.Tensor, channels_last: bool = False, offset: int = 0) -> np.ndarray:
    """The bits of a tensor, dense in the layout."""
    if channels_last and t.dim() == 4:
        t = t.permute(0, 2, 3, 1)
    bits = t.contiguous().flatten().view(_TORCH_BITS[t.element_size()])
    return place(bits.numpy(), offset)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> np.ndarray:
    """NaN in every dtype."""
    size = int(np.prod(shape))
    return place(np.full(size, -1, _BITS[torch.finfo(dtype).bits // 8]), offset)


def tensor_of(
    array: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False
) -> torch.Tensor:
    flat = torch.from_numpy(array.copy()).view(dtype)
    if channels_last and len(shape) == 4:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)


@functools.cache
def load_kernels() -> ModuleType:
    """The module that runs the kernels of csrc/cuda on arrays."""
    given = os.environ.get(MODULE_FOLDER)
    folder = Path(given) if given else cmake_build("cuda_emulated", TARGET) / "python"
    path = next(folder.glob(f"{TARGET}*.so"))
    spec = importlib.util.spec_from_file_location(TARGET, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated_kernels() -> ModuleType:
    return load_kernels()


@pytest.fixture
def thread_schedules() -> Iterator[Callable[[], Iterator[str]]]:
    """Iterates over orders of threads, each in force until the next one."""

    def each_schedule() -> Iterator[str]:
        for name in ("forward", "backward", "random"):
            load_kernels().set_schedule(name)
            yield name

    yield each_schedule
    load_kernels().set_schedule("forward")
