"""Fixtures shared by all tests: devices, threads, random state, poisoned memory."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Other workers need the core that a waiting thread of OpenMP would keep busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
import torchvision_operators.sitecustomize  # noqa: E402, F401


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        help="only the tests that run on a device, and those on this one only",
    )


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
    only = config.getoption("--device")
    if only and only not in available_devices():
        raise pytest.UsageError(f"--device {only}: not in this build, or not on this machine")


def pytest_generate_tests(metafunc) -> None:
    """A test that takes `device` runs wherever there are kernels, one of `cuda` on a GPU."""
    if not {"device", "cuda"} & set(metafunc.fixturenames):
        return
    devices = available_devices()
    only = metafunc.config.getoption("--device")
    if "device" in metafunc.fixturenames:
        chosen = [only] if only else devices
        metafunc.parametrize("device", [torch.device(name) for name in chosen], ids=str)
    if "cuda" in metafunc.fixturenames:
        absent = pytest.mark.skipif("cuda" not in devices, reason="needs a GPU and CUDA kernels")
        metafunc.parametrize("cuda", [pytest.param(torch.device("cuda"), marks=absent, id="cuda")])


def pytest_collection_modifyitems(config, items) -> None:
    only = config.getoption("--device")
    if only:
        wanted = {"device", "cuda"} if only == "cuda" else {"device"}
        kept = [item for item in items if wanted & set(item.fixturenames)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


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
