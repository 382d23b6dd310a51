"""Exported functions, layers and models of other people compute what the model does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import zipfile

import layers
import pytest
import torch
from cases import CASES, FILLED, REPRESENTATIVE, each, randn
from exporting import TENSORRT, Detector, Functions, OpenFunctions, operators
from torch import nn
from torch.export import Dim

from cotnet_ext import export, modules, optimize_for_inference, reference
from cotnet_ext.export import _program

OPEN = ({0: Dim("batch", min=1), 2: Dim("height", min=3), 3: Dim("width", min=3)},)
# What PyTorch says about itself while it exports.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

# ---- Functions -----------------------------------------------------------------------------------

NO_EMPTY_MAP = tuple(case for case in REPRESENTATIVE if case.name != "map_1x1")


def windows(dtype: torch.dtype) -> tuple[nn.Module, tuple]:
    model = Functions(NO_EMPTY_MAP).eval().to(dtype)
    inputs = [randn(*case.input_shape, dtype=dtype) for case in NO_EMPTY_MAP]
    weights = [randn(*case.weight_shape, dtype=dtype) for case in NO_EMPTY_MAP]
    return model, (inputs, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_windows_in_onnx(tmp_path, dtype):
    """Every kernel size, stride, dilation, padding and sharing, in fixed sizes."""
    model, args = windows(dtype)
    path = tmp_path / "functions.onnx"
    assert export.onnx(model, args, path) < 2e-3
    assert set(operators(path)) <= TENSORRT - {"Transpose", "Cast", "Gather", "Expand"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_function_of_open_maps_in_onnx(tmp_path, dtype):
    model = OpenFunctions().eval().to(dtype)
    x = randn(2, 12, 8, 6, dtype=dtype)
    more = [(randn(1, 12, 5, 9, dtype=dtype),), (randn(3, 12, 3, 3, dtype=dtype),)]
    path = tmp_path / "functions.onnx"
    error = export.onnx(model, (x,), path, dynamic_shapes=OPEN, samples=more)
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)
    assert set(operators(path)) <= TENSORRT - {"Transpose", "Cast"}


@each(FILLED)
def test_decompositions_are_the_operators(case):
    table = export.decompositions()
    x, w = randn(*case.input_shape), randn(*case.weight_shape)
    norm = randn(case.norm_size, key="weight"), randn(case.norm_size, key="bias")
    shift, static = randn(case.output_shape[1]), randn(*case.output_shape)
    calls = {
        "local_aggregation": (x, w),
        "softmax_aggregation": (x, w),
        "group_norm_aggregation": (x, w, *norm, 1e-5),
        "group_norm_aggregation_pool": (x, w, *norm, shift, static, 1e-5),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.cotnet_ext, name).default
        actual, expected = (f(*args, *case.op_geometry) for f in (table[op], op))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_decomposed_group_norm_without_parameters():
    case = CASES["heads2"]
    op = torch.ops.cotnet_ext.group_norm_aggregation.default
    decomposed = export.decompositions()[op]
    x, w, parameter = randn(*case.input_shape), randn(*case.weight_shape), randn(case.norm_size)
    for norm in ((None, None), (parameter, None), (None, parameter)):
        args = (x, w, *norm, 1e-5, *case.op_geometry)
        torch.testing.assert_close(decomposed(*args), op(*args), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decompositions_sum_in_float32(dtype):
    """A narrow result is rounded once: as near to the truth as that of the operator."""
    case = CASES["k7"]
    op = torch.ops.cotnet_ext.local_aggregation.default
    args = (randn(*case.input_shape, dtype=dtype), randn(*case.weight_shape, dtype=dtype))
    truth = op(*(t.double() for t in args), *case.op_geometry)
    actual = export.decompositions()[op](*args, *case.op_geometry)
    torch.testing.assert_close(actual, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


# ---- Layers --------------------------------------------------------------------------------------

# Every node that a layer has: no norm but the instance norm that depends on the input.
COMMON = {"Conv": 7, "Relu": 3, "Add": 5, "Mul": 5, "Sigmoid": 1, "ReduceMean": 2, "Softmax": 1}
COMMON |= {"Gemm": 2, "InstanceNormalization": 1, "Reshape": 7, "Unsqueeze": 1}
NODES = {
    "attention": {"Conv": 5, "Relu": 2, "Add": 2, "Mul": 1, "Softmax": 1, "Reshape": 2},
    "cot": COMMON | {"Split": 1, "Reshape": 6},
    # The groups of its `conv1x1` apart, so that no channels change places.
    "coxt": COMMON | {"Split": 1, "Conv": 8, "Add": 4},
}
# What keeps open axes of maps in their places costs no time: views.
MORE_NODES_OF_OPEN_MAPS = {
    "attention": {"Shape": 1},
    "cot": {"Unsqueeze": 3, "Squeeze": 2},
    "coxt": {"Unsqueeze": 3, "Squeeze": 2},
}


@layers.every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layers_in_onnx(tmp_path, name, dtype):
    layer = layers.build(modules, name, dtype).eval()
    x = layers.make_input(name, dtype)
    path = tmp_path / "layer.onnx"
    batch = ({0: OPEN[0][0]},)
    limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert export.onnx(layer, (x,), path, dynamic_shapes=batch, samples=[(x[:1],)]) < limit
    assert operators(path) == NODES[name]
    assert set(operators(path)) <= TENSORRT


@layers.every_kind
def test_layers_of_open_maps_in_onnx(tmp_path, name):
    layer = layers.build(modules, name, torch.float32).eval()
    x = layers.make_input(name, torch.float32)
    more = [(randn(1, x.shape[1], 5, 11, dtype=torch.float32),)]
    path = tmp_path / "layer.onnx"
    assert export.onnx(layer, (x,), path, dynamic_shapes=OPEN, samples=more) < 1e-6
    counts = operators(path)
    counts.subtract(MORE_NODES_OF_OPEN_MAPS[name])
    assert +counts == NODES[name] and min(counts.values()) >= 0
    assert set(counts) <= TENSORRT


@layers.every_kind
def test_layers_as_they_are_in_onnx(tmp_path, name):
    layer = layers.build(modules, name, torch.float32).eval()
    path = tmp_path / "layer.onnx"
    x = layers.make_input(name, torch.float32)
    assert export.onnx(layer, (x,), path, optimize=False) < 1e-6
    counts = operators(path)
    # Norms are in convolutions all the same, except after a sum and between turns of channels.
    assert counts["BatchNormalization"] == (2 if name == "coxt" else 1)
    assert set(counts) <= TENSORRT - {"Transpose", "Cast", "Shape"}


def test_onnx_file_says_what_is_open_and_nothing_of_this_machine(tmp_path):
    import onnx

    layer = layers.build(modules, "cot", torch.float32).eval()
    path = tmp_path / "layer.onnx"
    x = layers.make_input("cot", torch.float32)
    names = {"input_names": ["maps"], "output_names": ["context"], "opset": 20}
    export.onnx(layer, (x,), path, dynamic_shapes={"input": OPEN[0]}, **names)
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    for value, name in ((model.graph.input[0], "maps"), (model.graph.output[0], "context")):
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert (value.name, axes) == (name, ["batch", 16, "height", "width"])
    assert os.path.dirname(export.__file__).encode() not in path.read_bytes()


def test_weights_that_layers_only_slice_are_stored_once(tmp_path):
    layer = modules.CotLayer(128, 3).eval()
    path = tmp_path / "layer.onnx"
    export.onnx(layer, (randn(2, 128, 7, 7, dtype=torch.float32),), path)
    parameters = sum(p.nbytes for p in layer.parameters())
    # Beside them: kernels of ones and zeros of the aggregation.
    one_hot = 4 * 128 * 9 * (9 + 1)
    assert path.stat().st_size < 1.05 * parameters + one_hot + 20_000


# ---- Optimised layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CoTAttention", "CotLayer", "CoXtLayer"])
@pytest.mark.parametrize("dim", [16, 144])
def test_optimised_layers(tmp_path, name, dim):
    """The operator that only they have becomes what every runtime knows, too."""
    layer = optimize_for_inference(getattr(modules, name)(dim, kernel_size=3))
    x = randn(2, dim, 6, 7, dtype=torch.float32)
    batch = ({0: OPEN[0][0]},)
    path = tmp_path / "layer.onnx"
    assert export.onnx(layer, (x,), path, dynamic_shapes=batch, samples=[(x[:1],)]) < 1e-5
    assert set(operators(path)) <= TENSORRT
    for decompose in (False, True):
        path = tmp_path / f"{decompose}.pt2"
        export.pt2(layer, (x,), path, dynamic_shapes=batch, decompose=decompose)
        nodes = {str(n.target) for n in torch.export.load(path).graph.nodes}
        pools = any("group_norm_aggregation_pool" in target for target in nodes)
        kept = name == "CotLayer" or (name == "CoXtLayer" and dim > 128)
        assert pools == (kept and not decompose)
        assert decompose != any("cotnet_ext" in target for target in nodes)


# ---- Models of other people ----------------------------------------------------------------------


def detector() -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    batch = {0: Dim("batch", min=1)}
    arguments = {
        "args": (torch.randn(2, 3, 24, 32),),
        "kwargs": {"scale": torch.tensor([1.5])},
        "dynamic_shapes": {"images": batch, "scale": None},
    }
    return Detector().eval(), arguments


def test_detector_in_onnx(tmp_path):
    model, arguments = detector()
    path = tmp_path / "detector.onnx"
    images = torch.randn(5, 3, 24, 32)
    assert export.onnx(model, path=path, samples=[(images,)], **arguments) < 1e-6
    assert set(operators(path)) <= TENSORRT


def test_translations_serve_the_exporter_of_pytorch(tmp_path):
    model, arguments = detector()
    path = tmp_path / "detector.onnx"
    torch.onnx.export(
        model,
        f=path,
        custom_translation_table=export.onnx_translations(),
        external_data=False,
        dynamo=True,
        **arguments,
    )
    from cotnet_ext.export._onnx import Session

    samples = [(arguments["args"], arguments["kwargs"])]
    assert _program.compare(Session(path), model, samples, "the file") < 1e-6


@pytest.mark.parametrize("decompose", [False, True])
def test_program_of_a_detector(tmp_path, decompose):
    model, arguments = detector()
    path = tmp_path / "detector.pt2"
    more = [(torch.randn(1, 3, 24, 32),)]
    export.pt2(model, path=path, decompose=decompose, samples=more, **arguments)
    program = torch.export.load(path)
    ours = {str(n.target) for n in program.graph.nodes if "cotnet_ext" in str(n.target)}
    fused = {"spatial_softmax_gate", "group_norm_aggregation", "context_fusion"}
    assert ours == (set() if decompose else {f"cotnet_ext.{name}.default" for name in fused})
    assert set(program.state_dict) == set(model.state_dict())
    with zipfile.ZipFile(path) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist() if "json" in name)
    assert os.path.dirname(export.__file__).encode() not in text


ALONE = """
import sys
sys.modules["cotnet_ext"] = None  # an import of it fails
import torch
program, x, y = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(x)), y)
assert not hasattr(torch.ops.cotnet_ext, "local_aggregation")
"""


def test_decomposed_program_needs_only_pytorch(tmp_path):
    model = layers.build(modules, "cot", torch.float32).eval()
    x = layers.make_input("cot", torch.float32)
    program, before, after = (tmp_path / name for name in ("p.pt2", "x.pt", "y.pt"))
    export.pt2(model, (x,), program, dynamic_shapes=OPEN, decompose=True)
    other = randn(3, 16, 5, 4, dtype=torch.float32)
    torch.save(other, before)
    command = [sys.executable, "-c", ALONE, *map(str, (program, before, after))]
    subprocess.run(command, check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = model(other)
    torch.testing.assert_close(torch.load(after), expected, rtol=1e-5, atol=1e-5)


def test_reference_models_export_as_well(tmp_path):
    layer = layers.build(reference, "cot", torch.float32).eval()
    x = layers.make_input("cot", torch.float32)
    assert export.onnx(layer, (x,), tmp_path / "layer.onnx") < 1e-6


# ---- Refusals, and files that stay as they were --------------------------------------------------

LINEAR = (nn.Linear(4, 2).eval(), (torch.ones(3, 4),))


def test_training_mode_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"model must be in evaluation mode, but its '1' is not"):
        export.onnx(model, LINEAR[1], tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"but it is not: call model.eval\(\)"):
        export.pt2(model.train(), LINEAR[1], tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_me"),
        ({"args": LINEAR[1][0]}, TypeError, "args must be the tuple .* got Tensor"),
        ({"path": "m.pt2"}, ValueError, "path must end in .onnx, got 'm.pt2'"),
        ({"opset": 17}, ValueError, r"opset must be from 18 to \d+ .*, got 17"),
        ({"opset": 99}, ValueError, r"opset must be from 18 to \d+ .*, got 99"),
        ({"opset": "18"}, TypeError, "opset must be an int, got '18'"),
        ({"opset": True}, TypeError, "opset must be an int, got True"),
        (
            {"model": copy.deepcopy(LINEAR[0]).bfloat16(), "opset": 18},
            ValueError,
            r"opset of a model in bfloat16 must be from 22 to \d+",
        ),
        ({"path": "missing/m.onnx"}, OSError, "missing"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, change, error, text):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": LINEAR[0], "args": LINEAR[1], "path": "m.onnx"} | change
    with pytest.raises(error, match=text):
        export.onnx(**arguments)
    assert list(tmp_path.iterdir()) == []


class Noise(nn.Module):
    """A model that no file can repeat."""

    def forward(self, x):
        return x * torch.rand_like(x)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_what_computes_something_else_is_not_written(tmp_path, kind):
    path = tmp_path / f"model.{kind}"
    path.write_bytes(b"before")
    with pytest.raises(export.ExportError, match="of its norm away from the model's, more than"):
        getattr(export, kind)(Noise().eval(), LINEAR[1], path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@torch.library.custom_op("cotnet_ext_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x + 1


odd.register_fake(torch.empty_like)


class Odd(nn.Module):
    def forward(self, x):
        return odd(x)


def test_operators_without_onnx_are_named(tmp_path):
    with pytest.raises(export.ExportError, match="no ONNX for a part of the model: .*test.odd"):
        export.onnx(Odd().eval(), LINEAR[1], tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_comparison_sees_every_difference():
    x = torch.ones(3)
    cases = [
        (lambda x: (x, x), lambda x: x, "returns 1 tensors, the model 2"),
        (lambda x: x, lambda x: x[:2], r"is torch.float32 \[2\], the model's is .* \[3\]"),
        (lambda x: x, lambda x: x.double(), "is torch.float64"),
        (lambda x: x.int(), lambda x: 2 * x.int(), "differs from the model's"),
        (lambda x: x, lambda x: x * 1.001, "0.001 of its norm away from the model's, more than"),
        (lambda x: x, lambda x: x * torch.nan, "nan of its norm"),
        (lambda x: x / 0, lambda x: x / 0, "cannot be checked: the model's own is not finite"),
        (lambda x: 0 * x, lambda x: 0 * x + 1, "away from the model's"),
    ]
    for model, run, text in cases:
        with pytest.raises(export.ExportError, match=text):
            _program.compare(run, model, [((x,), {})], "it")
    for model in (lambda x: x, lambda x: x.int(), lambda x: 0 * x):
        assert _program.compare(model, model, [((x,), {})], "it") == 0
