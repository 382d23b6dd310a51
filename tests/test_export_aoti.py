"""AOTInductor packages, and docs/export.md: its commands run as they stand, C++ included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import layers
import pytest
import torch
from cpp_build import ROOT
from documents import blocks, broken_links, run_document
from exporting import TENSORRT, operators

from cotnet_ext import export, modules
from cotnet_ext.models import create_model

DOCUMENT = ROOT / "docs" / "export.md"
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's compilers, about themselves

ALONE = """
import sys
sys.modules["cotnet_ext"] = None  # an import of it fails
import torch
package, x, y = sys.argv[1:]
torch.save(torch._inductor.aoti_load_package(package)(torch.load(x)), y)
assert not hasattr(torch.ops.cotnet_ext, "spatial_softmax_gate")
"""


def test_decomposed_package_needs_only_pytorch(tmp_path):
    layer = layers.build(modules, "attention_k1", torch.float32).eval()
    x = layers.make_input("attention_k1", torch.float32)
    package, before, after = (tmp_path / name for name in ("p.pt2", "x.pt", "y.pt"))
    assert export.aoti(layer, (x,), package, decompose=True) < 1e-5
    torch.save(x, before)
    command = [sys.executable, "-c", ALONE, *map(str, (package, before, after))]
    subprocess.run(command, check=True, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(after), layer(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder in which the document was run, with the sources that it builds, and its output."""
    folder = tmp_path_factory.mktemp("document")
    for name in ("CMakeLists.txt", "build_backend", "cotnet_ext", "csrc", "examples"):
        (folder / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    network = create_model("cotnet50", num_classes=10)
    torch.save(network.state_dict(), folder / "weights.pth")
    torch.save(torch.rand(3, 3, 64, 64), folder / "images.pt")
    return folder, run_document(DOCUMENT, folder)


def network_of(folder: Path) -> torch.nn.Module:
    return create_model("cotnet50", num_classes=10, checkpoint=folder / "weights.pth").eval()


def test_files_of_the_document_compute_what_the_network_does(documented):
    from cotnet_ext.export._onnx import Session

    folder, _ = documented
    images = torch.load(folder / "images.pt")
    with torch.no_grad():
        expected = network_of(folder)(images)
    runs = {
        "cotnet50.onnx": Session(folder / "cotnet50.onnx"),
        "cotnet50.pt2": torch.export.load(folder / "cotnet50.pt2").module(),
        "cotnet50_aoti.pt2": torch._inductor.aoti_load_package(str(folder / "cotnet50_aoti.pt2")),
    }
    for name, run in runs.items():
        result = run(images)
        result = result[0] if isinstance(result, tuple | list) else result
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_files_are_as_large_as_the_parameters(documented):
    folder, _ = documented
    parameters = sum(p.nbytes for p in network_of(folder).parameters())
    for name in ("cotnet50.onnx", "cotnet50.pt2", "cotnet50_aoti.pt2"):
        assert 0.99 * parameters < (folder / name).stat().st_size < 1.05 * parameters, name


def test_whole_network_has_no_operator_too_many(documented):
    folder, _ = documented
    counts = operators(folder / "cotnet50.onnx")
    assert set(counts) <= TENSORRT - {"Transpose", "Cast", "Shape", "BatchNormalization"}
    assert counts["InstanceNormalization"] == 16  # one in each layer


def test_program_in_cpp_finds_what_python_finds(documented):
    folder, printed = documented
    with torch.no_grad():
        best, classes = network_of(folder)(torch.load(folder / "images.pt")).softmax(1).max(1)
    found = [line for line in "".join(printed).splitlines() if line.startswith("image ")]
    assert found == [
        f"image {i}: class {c}, {p:.4f}" for i, (c, p) in enumerate(zip(classes, best, strict=True))
    ]
    classify = folder / "build" / "cmake" / "examples" / "cpp" / "classify"
    linked = subprocess.run(["ldd", classify], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked and "libpython" not in linked


def test_program_in_cpp_says_what_is_wrong(documented):
    classify = documented[0] / "build" / "cmake" / "examples" / "cpp" / "classify"
    for arguments, text in (((), "usage: classify"), (("a", "b", "missing.so"), "missing.so")):
        done = subprocess.run([classify, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("classify: ") and text in done.stderr


def test_document_links_lead_somewhere():
    assert broken_links(DOCUMENT) == []
    assert len(blocks(DOCUMENT)) >= 5
