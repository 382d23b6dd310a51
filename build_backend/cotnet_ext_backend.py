"""setuptools' PEP 517 backend, taught one thing: build against the torch that is already there.

An isolated build cannot see the packages of the environment it installs into, and naming torch as
a build requirement would make pip fetch a second one, of several gigabytes and perhaps for another
CUDA. But pip runs these hooks with that environment's own interpreter, so its packages can be
found by asking it. Only where there is no torch at all (uv and `python -m build` make an
interpreter of their own) is torch requested; the stable ABI makes that binary right all the same.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from cotnet_ext_native import TORCH_TARGET
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  hooks that need no torch, as they are
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _torch_is_visible() -> bool:
    """Whether torch can be imported, if need be after opening the interpreter's own paths."""
    if importlib.util.find_spec("torch") is None:
        # -E: without the environment variables through which pip hides the ordinary paths.
        command = [sys.executable, "-E", "-c", "import json, sys; print(json.dumps(sys.path))"]
        paths = json.loads(subprocess.check_output(command, text=True))
        # At the end, so that the build requirements which pip installed keep their precedence.
        sys.path.extend(path for path in paths if path and path not in sys.path)
        importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def _torch_requirement() -> list[str]:
    return [] if _torch_is_visible() else [f"torch>={'.'.join(map(str, TORCH_TARGET))}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _torch_is_visible()
    # setuptools adds to what it collected last time: files that are gone since would be shipped.
    for collected in Path("build").glob("lib*"):
        shutil.rmtree(collected)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _torch_is_visible()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
