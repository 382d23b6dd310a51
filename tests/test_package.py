"""The package as a whole: who imports whom, what the library needs and shows, what is shipped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpp_build import ROOT, run

import cotnet_ext

BACKEND = ROOT / "build_backend"
PACKAGE = ROOT / "cotnet_ext"
CSRC = ROOT / "csrc"

# ---- Direction of imports ------------------------------------------------------------------------

# A module imports from the rows below its own and from nothing else of ours; `reference`, the
# specification, imports torch only. Packages (demo, models) are one module, free inside.
LAYERS = (
    {"cli", "__main__"},
    {"export", "prediction"},
    {"conversion", "demo", "inference"},
    {"models"},
    {"checkpoints", "compat"},
    {"_bottleneck_training", "modules"},
    {
        "_attention_training",
        "_convolutions",
        "_group_norm_aggregation_pool",
        "_training",
    },
    {"functional", "_fusable", "_layer_steps", "_norm_relu", "_pointwise"},
    {"_autograd", "_batch_norm", "_layer_parameters", "_maps", "_plain", "_products"},
    {"_ops"},
    {"_checks"},
    {"_C", "_files", "_version"},
)
# Only what compares with the specification, or builds networks of it, may know it.
MAY_IMPORT_REFERENCE = {"cli", "conversion", "demo", "export", "inference", "models"}


def allowed_imports(module: str) -> set[str]:
    if module == "reference":
        return set()
    row = next(index for index, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[row + 1 :])
    return below | ({"reference"} if module in MAY_IMPORT_REFERENCE else set())


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    """The top-level modules of cotnet_ext that a file imports, inside functions too."""
    own_package = ["cotnet_ext", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = own_package[: len(own_package) - node.level + 1] if node.level else []
            base = ".".join([*anchor, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "cotnet_ext":
                yield rest.partition(".")[0] or "__init__"


PYTHON_FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    module = module_of(path)
    assert set(imported_modules(path)) - {module} <= allowed_imports(module)


def test_the_reader_of_imports_finds_them():
    assert set(imported_modules(PACKAGE / "_autograd" / "context_fusion.py")) >= {"_ops"}
    assert set(imported_modules(PACKAGE / "demo" / "compare.py")) >= {"demo", "reference"}


# What a file of C++ may include of ours, by the first rule that fits its path.
INCLUDES = (
    (r"core/.*", r"core/.*"),
    # Launches are chosen from the numbers of the device, which only host code can read.
    (r"host/cuda_context\.h", r"(core|host)/.*|cuda/launch\.h"),
    (r"host/.*", r"(core|host)/.*"),
    # Loops and device code know no tensors: they compile alone, also against NumPy.
    (r"cpu/.*\.h", r"(core|cpu)/.*"),
    # The tests bring twins of what device code uses of CUDA.
    (r"cuda/device\.cuh", r"(core|cuda)/.*|emulator\.h"),
    (r"cuda/.*\.(cuh|h)", r"(core|cuda)/.*"),
    (r"cpu/.*\.cpp", r"(core|host|cpu)/.*"),
    (r"cuda/.*\.cu", r"(core|host|cuda)/.*"),
    (r"library\.cpp", r"(core/.*|cpu/capability\.h)"),
)
CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_point_one_way(path):
    name, text = path.relative_to(CSRC).as_posix(), path.read_text()
    allowed = next(rule for pattern, rule in INCLUDES if re.fullmatch(pattern, name))
    # Loops are included through a macro that names their file.
    for ours in re.findall(r'^#(?:include|define COTNET_LOOPS) "(.+)"', text, re.MULTILINE):
        assert re.fullmatch(allowed, ours), f"{name} includes {ours}"
        assert (CSRC / ours).is_file() or (ROOT / "tests" / "cuda_emulator" / ours).is_file()
    foreign = re.findall(r"^#include <(.+)>", text, re.MULTILINE)
    knows_tensors = re.match(r"host/|library\.cpp|.*\.(cpp|cu)$", name)
    torch = [header for header in foreign if header.startswith(("torch/", "ATen/", "c10/"))]
    assert not torch or knows_tensors, f"{name} includes {torch}"
    assert all(header.startswith(("torch/csrc/", "torch/headeronly/")) for header in torch)
    assert "Python.h" not in foreign or name == "library.cpp"


def registered(files: Iterator[Path], key: str) -> list[str]:
    """Names of the operators that these files give kernels for a dispatch key."""
    blocks = (path.read_text().partition(f"_IMPL(cotnet_ext, {key}, m)")[2] for path in files)
    return sorted(name for text in blocks for name in re.findall(r'm\.impl\("(\w+)"', text))


def test_every_operator_has_one_kernel_for_each_device():
    schemas = re.findall(r'm\.def\("(\w+)\(', (CSRC / "library.cpp").read_text())
    computing = sorted(set(schemas) - {"build_info"})
    assert registered(CSRC.glob("cpu/*.cpp"), "CPU") == computing
    assert registered(CSRC.glob("cuda/*.cu"), "CUDA") == computing


# Each waits for the GPU, takes memory behind PyTorch's allocator, or gives sums no fixed order.
FORBIDDEN = r"Synchronize|cudaMalloc|cudaFree|cudaMemcpy\b|cudaMemset\b|atomic(Add|CAS|Exch)|<<<"


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_cuda_code_keeps_the_rules(path):
    text = re.sub(r"//.*", "", path.read_text())
    if path.name != "device.cuh":  # it launches, for all others
        assert not re.search(FORBIDDEN, text)
    if path.suffix == ".cu":
        assert "CudaContext" in text and "STD_CUDA_KERNEL_LAUNCH_CHECK();" in text


# ---- The compiled library ------------------------------------------------------------------------

LIBRARY = Path(cotnet_ext._C.__file__)


def dynamic_symbols(option: str) -> list[str]:
    return [line.split()[-1] for line in run("nm", "-D", option, LIBRARY).splitlines()]


def test_library_is_one_for_all_pythons():
    assert LIBRARY.name == "_C.abi3.so"
    undefined = dynamic_symbols("--undefined-only")
    python = {name for name in undefined if name.startswith(("Py", "_Py"))}
    # Both are of the limited API since Python 3.2 and 3.5.
    assert python and python <= {"PyModule_Create2", "PyModuleDef_Init"}


def test_library_needs_only_the_stable_abi_of_torch():
    # Those of the C and C++ runtimes carry a version, and the linker's own are weak.
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    symbols = {name for name in dynamic_symbols("--undefined-only") if "@" not in name} - weak
    others = {name for name in symbols if not name.startswith(("aoti_torch_", "torch_", "Py"))}
    assert others == set()
    assert "aoti_torch_library_init_def" in symbols
    needed = run("readelf", "-d", LIBRARY)
    assert "libtorch_cpu.so" in needed
    assert "libtorch_python" not in needed and "libpython" not in needed


def test_library_shows_only_its_entry_point():
    symbols = dynamic_symbols("--defined-only")
    assert "PyInit__C" in symbols
    assert [name for name in symbols if "cotnet" in name] == []


# ---- What is shipped -----------------------------------------------------------------------------


def build(hook: str, folder: Path) -> Path:
    """The file that the PEP 517 backend makes; objects of earlier builds are used again."""
    code = f"import cotnet_ext_backend as b; print(b.{hook}({str(folder)!r}))"
    output = run(sys.executable, "-c", code, cwd=ROOT, env={"PYTHONPATH": str(BACKEND)})
    return folder / output.splitlines()[-1]


def test_wheel(tmp_path):
    wheel = build("build_wheel", tmp_path)
    assert wheel.name.startswith(f"cotnet_ext-{cotnet_ext.__version__}-cp310-abi3-")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"cotnet_ext/{path.relative_to(PACKAGE).as_posix()}" for path in PYTHON_FILES}
    data = {"cotnet_ext/__init__.py", "cotnet_ext/_C.abi3.so", "cotnet_ext/py.typed"}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == modules | data
    assert any(name.endswith("/LICENSE") for name in metadata)


def test_source_distribution_builds_what_the_repository_builds(tmp_path):
    with tarfile.open(build("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [*CPP_FILES, *PYTHON_FILES, *BACKEND.glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    files += [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE")]
    assert names >= {path.relative_to(ROOT).as_posix() for path in files}
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_every_source_is_compiled():
    sys.path.insert(0, str(BACKEND))
    from cotnet_ext_native import sources

    compiled = {path.relative_to(ROOT).as_posix() for path in CPP_FILES}
    compiled = {name for name in compiled if name.endswith((".cpp", ".cu"))}
    assert set(sources(cuda=True)) == compiled
    assert set(sources(cuda=False)) == {name for name in compiled if name.endswith(".cpp")}


# ---- What a user meets ---------------------------------------------------------------------------


def test_all_names_are_there_and_public():
    names = cotnet_ext.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(cotnet_ext, name) for name in names)
    public = {name for name in cotnet_ext.functional.__all__}
    assert public <= set(names)
    assert {name for name in cotnet_ext.modules.__all__} <= set(names)
    assert (PACKAGE / "py.typed").exists()


IMPORT = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import cotnet_ext
print(f"{(time.perf_counter() - start) * 1e3:.0f} ms beyond torch's own import")
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in set(sys.modules) - before if name.startswith("torch.")))
"""


def test_import_brings_nothing_heavy():
    """`import cotnet_ext` costs what its own files cost: no plots, no compiler, no models."""
    time, roots, of_torch = run(sys.executable, "-c", IMPORT).splitlines()[-3:]
    print(time)
    heavy = {"matplotlib", "numpy", "rich", "setuptools", "sklearn", "timm"}
    assert not heavy & set(roots.split())
    assert not re.search(r"torch\.(_dynamo|_inductor|onnx|utils\.cpp_extension)\b", of_torch)


# ---- Text ----------------------------------------------------------------------------------------

# Spelled in two halves, so that this file does not contain what it looks for.
UNWANTED = [
    first + second
    for first, second in (
        ("/wo", r"rk\b"),
        ("/ro", r"ot\b"),
        ("/ho", r"me/"),
        ("/op", r"t/"),
        ("index-", "url"),
        ("find-", "links"),
        ("TO", "DO"),
        ("FIX", "ME"),
    )
]


def written_files() -> Iterator[Path]:
    """The files of the repository that people wrote, from git or, without it, by their folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        folders = (PACKAGE, CSRC, BACKEND, ROOT / "tests", ROOT / "benchmarks")
        found = (*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*")))
        hidden = re.compile(r"(^|/)(\.|__pycache__)")
        paths = [path for path in found if not hidden.search(str(path.relative_to(ROOT)))]
    text = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".in", ""}
    return (path for path in paths if path.is_file() and path.suffix in text)


def test_text_is_free_of_private_places_and_leftovers():
    files = list(written_files())
    assert ROOT / "setup.py" in files and CSRC / "library.cpp" in files
    unwanted = re.compile("|".join(UNWANTED))
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not unwanted.search(line), f"{path.relative_to(ROOT)}:{number}: {line}"
