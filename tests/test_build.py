"""The choices of the build, and the C++ that needs no torch against NumPy and PyTorch."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch
from cpp_build import ROOT, cmake_build, run

BACKEND = ROOT / "build_backend"
sys.path.insert(0, str(BACKEND))
import cotnet_ext_native as native  # noqa: E402

# ---- CPU or CUDA ---------------------------------------------------------------------------------

# What `nvcc --list-gpu-arch` prints in CUDA 12.6 and in CUDA 13.0.
NVCC_12_6 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
NVCC_13_0 = "75 80 86 87 88 89 90 100 110 103 120 121"


def compute(numbers: str) -> list[str]:
    return [f"compute_{number}" for number in numbers.split()]


def test_default_arch_list_is_what_nvcc_knows():
    assert native.default_arch_list(compute(NVCC_12_6)) == "7.5;8.0;8.6;8.9;9.0+PTX"
    assert native.default_arch_list(compute(NVCC_13_0)) == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    with pytest.raises(SystemExit, match="set TORCH_CUDA_ARCH_LIST"):
        native.default_arch_list(compute("30 35"))


def test_default_arch_list_is_accepted_by_torch(monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", native.default_arch_list(compute(NVCC_13_0)))
    flags = cpp_extension._get_cuda_arch_flags()
    assert "-gencode=arch=compute_75,code=sm_75" in flags
    assert "-gencode=arch=compute_120,code=compute_120" in flags
    assert len(flags) == len(native.ARCHITECTURES) + 1


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "kernels", "reason"),
    [
        ("12.8", "12.6", 5, ""),
        (None, "12.6", 5, "torch is not a CUDA build"),
        ("12.8", None, 5, "nvcc was not found"),
        ("12.8", "13.0", 5, "nvcc is 13.0 but torch was built with CUDA 12.8"),
        ("12.8", "12.8", 0, "no kernels"),
    ],
)
def test_cuda_needs_torch_and_nvcc_of_one_major_version(torch_cuda, nvcc, kernels, reason):
    obstacle = native.cuda_obstacle(torch_cuda, nvcc, kernels)
    assert reason in obstacle
    assert native.choose_cuda("auto", obstacle) == (reason == "", obstacle)
    assert native.choose_cuda("0", obstacle) == (False, "COTNET_EXT_CUDA=0")
    if reason:
        with pytest.raises(SystemExit, match=f"COTNET_EXT_CUDA=1, but .*{reason}"):
            native.choose_cuda("1", obstacle)
    else:
        assert native.choose_cuda("1", obstacle) == (True, "")


@pytest.mark.parametrize("mode", ["", "yes", "2", "AUTO"])
def test_other_values_of_the_switch_are_errors(mode):
    with pytest.raises(SystemExit, match="must be auto, 0 or 1"):
        native.choose_cuda(mode, "")


@pytest.mark.parametrize(
    ("jobs", "files", "threads"), [(2, 8, 1), (16, 8, 2), (16, 5, 3), (1, 1, 1), (4, 0, 4)]
)
def test_nvcc_uses_the_processors_that_files_leave_idle(jobs, files, threads):
    assert native.nvcc_flags("12.8", jobs, files) == [f"--threads={threads}"]
    assert native.nvcc_flags("13.0", jobs, files)[1:] == ["--compress-mode=size"]


def test_nvcc_is_asked_for_its_version_and_its_toolkit():
    version = "Cuda compilation tools, release 12.8, V12.8.61"
    assert native.nvcc_release(version) == "12.8"
    assert native.nvcc_release("command not found") is None
    dry_run = "#$ _SPACE_= \n#$ _HERE_=/usr/lib/cuda/bin\n#$ TOP=/usr/lib/cuda/bin/..\n"
    assert native.toolkit_of(dry_run) == "/usr/lib/cuda"
    assert native.toolkit_of("") is None
    assert native.output_of("cotnet-ext-no-such-program") == ""


# ---- Which torch ---------------------------------------------------------------------------------


def test_torch_older_than_the_target_is_refused():
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0a0+git1234567"):
        native.check_torch(version)
    for version in ("2.9.1+cu128", "1.13.0"):
        with pytest.raises(SystemExit, match=r"needs torch 2\.10 or newer to build, found torch"):
            native.check_torch(version)


def test_one_oldest_torch_and_python_everywhere():
    assert native.torch_target_macro() == "0x020a000000000000"
    package = importlib.metadata.metadata("cotnet_ext")
    assert "torch>=2.10" in package.get_all("Requires-Dist")
    assert package["Requires-Python"] == ">=3.10"
    assert package["Version"] == native.version()
    # In [build-system] it would make pip fetch a second torch for every build.
    head = (ROOT / "pyproject.toml").read_text().partition("[project]")[0]
    assert 'requires = ["setuptools", "wheel", "ninja"]' in head


HOOKS = ("get_requires_for_build_wheel", "get_requires_for_build_editable")
ASK = f"""
import importlib.util, json
before = importlib.util.find_spec("torch") is not None
import cotnet_ext_backend as backend
print(json.dumps([before, *(getattr(backend, hook)() for hook in {HOOKS})]))
"""


def ask_backend(python: str | Path, folder: Path) -> list:
    """Run the hooks as pip does: an interpreter that sees the build requirements and no more."""
    site = Path(setuptools.__file__).parents[1]
    for part in [*site.glob("setuptools*"), site / "_distutils_hack"]:
        (folder / part.name).symlink_to(part)
    hooks = {"PYTHONPATH": f"{folder}:{BACKEND}"}
    # -S: no site-packages, which is what pip's isolation comes down to.
    return json.loads(run(python, "-S", "-c", ASK, cwd=ROOT, env=hooks).splitlines()[-1])


def test_isolated_builds_use_the_torch_that_is_installed(tmp_path):
    assert ask_backend(sys.executable, tmp_path) == [False, [], []]


def test_torch_is_requested_where_there_is_none(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    answer = ask_backend(tmp_path / "venv" / "bin" / "python", tmp_path)
    assert answer == [False, ["torch>=2.10"], ["torch>=2.10"]]


# ---- C++ without torch, against NumPy and PyTorch ------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    folder = cmake_build("cmake", "cotnet_kernels")
    sys.path.insert(0, str(folder / "python"))
    try:
        import cotnet_kernels

        yield cotnet_kernels
    finally:
        sys.path.remove(str(folder / "python"))


def grid(*axes) -> list[np.ndarray]:
    return [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]


def test_output_size_counts_what_unfold_counts(kernels):
    sizes = grid(range(1, 8), range(1, 5), range(1, 4), range(3), range(1, 3))
    found = kernels.output_size(*sizes)
    fits = found > 0
    assert fits.any() and not fits.all()
    for (size, kernel, stride, padding, dilation), count in zip(
        np.stack(sizes, 1)[fits].tolist(), found[fits], strict=True
    ):
        columns = torch.nn.functional.unfold(
            torch.empty(1, 1, size, 1), (kernel, 1), (dilation, 1), (padding, 0), (stride, 1)
        )
        assert columns.shape[2] == count


@pytest.mark.parametrize("size", [2, 3, 7])
def test_reflection_is_numpys(kernels, size):
    padding = size - 1
    expected = np.pad(np.arange(size), padding, mode="reflect")
    found = kernels.reflected(np.arange(-padding, size + padding), size)
    np.testing.assert_array_equal(found, expected)


EVERY_PATTERN = np.arange(2**16, dtype=np.uint16)


def test_half_widens_as_in_numpy(kernels):
    expected = EVERY_PATTERN.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(kernels.widen_half(EVERY_PATTERN), expected)


def test_bfloat16_widens_as_in_torch(kernels):
    expected = torch.from_numpy(EVERY_PATTERN.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(kernels.widen_bfloat16(EVERY_PATTERN), expected)


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_rounding_is_that_of_torch(kernels, name):
    """Random bits are floats of every magnitude, subnormal and infinite in 16 bits included."""
    dtype = getattr(torch, name)
    bits = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32)
    # And the hard cases: every 16-bit value, the exact middles between two, and their neighbours.
    exact = torch.from_numpy(EVERY_PATTERN.view(np.int16)).view(dtype).float().numpy()
    exact = exact[np.isfinite(exact)]
    middles = (exact.astype(np.float64) + np.roll(exact, 1)) / 2
    middles = middles.astype(np.float32)
    near = [np.nextafter(middles, np.float32(way)) for way in (-np.inf, np.inf)]
    values = np.concatenate([bits.view(np.float32), exact, middles, *near])

    found = getattr(kernels, f"narrow_{name}")(values)
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    widened = getattr(kernels, f"widen_{name}")(found[nan])
    assert nan.any() and np.isnan(widened).all()
