"""Builds `cotnet_ext._C`, the library of C++ operators. Metadata is in pyproject.toml.

Environment variables:
    COTNET_EXT_CUDA=auto|0|1   with CUDA when torch is a CUDA build and nvcc is found; never; always
    TORCH_CUDA_ARCH_LIST       GPU generations, such as "8.0;9.0+PTX"
    COTNET_EXT_NATIVE=1        tune for this processor; the library may not run on others
    COTNET_EXT_DEBUG=1         no optimisation, debug symbols
    MAX_JOBS                   compilers that run at a time
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import cotnet_ext_native as native  # noqa: E402


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_nvcc() -> str | None:
    """The nvcc that torch's BuildExtension will run."""
    on_path = shutil.which("nvcc")
    if on_path and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        toolkit = native.toolkit_of(native.output_of(on_path, "--dryrun", "-x", "cu", os.devnull))
        if toolkit:
            os.environ["CUDA_HOME"] = toolkit
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc")
    return str(nvcc) if nvcc and nvcc.exists() else None


def pip_cuda_headers() -> list[str]:
    """Headers in the CUDA pip packages beside torch, for toolkits that came without them."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else []
    return sorted(str(path) for root in roots for path in Path(root).glob("*/include"))


def compile_flags(definitions: dict[str, str], for_nvcc: list[str]) -> dict[str, list[str]]:
    """Flags for both compilers; torch adds the language standard, Py_LIMITED_API and, for nvcc, the
    GPU generations of TORCH_CUDA_ARCH_LIST."""
    macros = [f"-D{name}={value}" for name, value in definitions.items()]
    debug = switch("COTNET_EXT_DEBUG")
    cxx = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # sqrt and exp need not set errno, and nobody reads the floating-point status flags: loops
    # vectorise better, and results stay the same bits. This is not fast-math.
    cxx += ["-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    cxx += ["-march=native"] * switch("COTNET_EXT_NATIVE")
    # No fast math either. Line numbers are for profilers and sanitizers and cost no time.
    nvcc = ["-O0", "-g", "-G"] if debug else ["-O3", "-lineinfo"]
    nvcc += [*for_nvcc, "-Xcompiler=-fvisibility=hidden"]
    # USE_CUDA: torch's headers then declare the functions that know streams and launch errors.
    nvcc += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={native.torch_target_macro()}"]
    return {"cxx": cxx + macros, "nvcc": nvcc}


def native_build() -> dict:
    """The arguments of setup() that compile the library, after saying what will be compiled."""
    import torch

    native.check_torch(torch.__version__)
    nvcc = find_nvcc()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    release = nvcc and native.nvcc_release(native.output_of(nvcc, "--version"))
    kernels = len(native.sources(cuda=True)) - len(native.sources(cuda=False))
    cuda, reason = native.choose_cuda(
        os.environ.get("COTNET_EXT_CUDA", "auto"),
        native.cuda_obstacle(torch.version.cuda, release, kernels),
    )
    definitions = native.definitions()
    if cuda:
        # Left unset, torch would ask for the GPUs that it sees, and fail on a machine without one.
        known = native.output_of(nvcc, "--list-gpu-arch").split()
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or native.default_arch_list(known)
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        definitions = native.definitions(release, archs.replace(";", " "))

    # The limited API gives one library for all Pythons; free-threaded Python has none so far.
    limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")
    sources = native.sources(cuda)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    flags = compile_flags(definitions, native.nvcc_flags(release, jobs, kernels) if cuda else [])

    target = ".".join(map(str, native.TORCH_TARGET))
    print(f"cotnet_ext {native.version()}: building for {'CPU and CUDA' if cuda else 'CPU only'}")
    print(f"  CUDA:    {f'nvcc {release}, {archs}' if cuda else f'no, {reason}'}")
    print(f"  torch:   {torch.__version__}; the library runs on {target} and newer")
    print(f"  sources: {len(sources)} files, {' '.join(flags['cxx'][:2])}", flush=True)

    class BuildLibrary(BuildExtension):
        """Objects stay in a folder of the repository for every kind of install: ninja compiles what
        changed. With CUDA in one of their own: other macros compile every file again."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / ("objects-cuda" if cuda else "objects"))

    extension = (CUDAExtension if cuda else CppExtension)(
        "cotnet_ext._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        # Before torch's libraries, which carry parts of the C++ library that are not for us to use.
        libraries=["stdc++"] if sys.platform == "linux" else [],
        extra_compile_args=flags,
        # Programs without Python load the library too: names of Python stay open until called.
        extra_link_args=["-Wl,-z,lazy"] if sys.platform == "linux" else [],
        py_limited_api=limited_api,
    )
    # Last, so that a toolkit's own headers are found before those of the pip packages.
    extension.include_dirs += pip_cuda_headers() if cuda else []
    tag = "cp{}{}".format(*native.PYTHON_TARGET)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildLibrary},
        "options": {"bdist_wheel": {"py_limited_api": tag}} if limited_api else {},
    }


# Metadata and source distributions need neither torch nor a compiler.
compiling = not {"egg_info", "dist_info", "sdist", "clean"} & set(sys.argv[1:])
setup(license="Apache-2.0", **native_build() if compiling else {})
