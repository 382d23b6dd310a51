"""Fixtures shared by all tests: devices, threads, random state, poisoned memory."""

from __future__ import annotations

import pytest
import torch


def available_devices() -> list[str]:
    """The devices that this build has kernels for and this machine has."""
    import cotnet_ext

    devices = ["cpu"]
    if cotnet_ext.build_info()["cuda"] and torch.cuda.is_available():
        devices.append("cuda")
    return devices


def pytest_configure(config) -> None:
    # Two threads exercise the parallel paths and leave the rest of a small machine alone.
    torch.set_num_threads(2)
    # Users must not be bothered by what we call.
    config.addinivalue_line("filterwarnings", "error:::cotnet_ext")


def pytest_generate_tests(metafunc) -> None:
    """A test that takes `device` runs on every device with kernels."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(
            "device", [torch.device(name) for name in available_devices()], ids=str
        )


@pytest.fixture(autouse=True)
def _random_state():
    """No test sees, or leaves behind, another test's random state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def poisoned_memory():
    """Fill every tensor that PyTorch allocates without a value with NaN.

    A kernel that leaves one element of its result unwritten then returns NaN there.
    `test_memory.py` proves that allocations inside our operators are covered.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(7).isnan().all(), "poisoning does not work"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
