"""ONNX files: the exporter of PyTorch with this package's translations, made smaller, and run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ._program import ExportError, tensors

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_OPSET = 18  # that of PyTorch's exporter, and of our translations
OLDEST_OPSET_OF_BFLOAT16 = 22  # in which Conv and InstanceNormalization take it


def newest_opset() -> int:
    from torch.onnx._constants import ONNX_MAX_OPSET

    return ONNX_MAX_OPSET


def choose_opset(opset: int | None, has_bfloat16: bool) -> int:
    """The opset that was asked for, or the oldest that will do."""
    oldest = OLDEST_OPSET_OF_BFLOAT16 if has_bfloat16 else OLDEST_OPSET
    if opset is None:
        return oldest
    if not isinstance(opset, int) or isinstance(opset, bool):
        raise TypeError(f"opset must be an int, got {opset!r}")
    if not oldest <= opset <= newest_opset():
        of_what = " of a model in bfloat16" if has_bfloat16 else ""
        raise ValueError(
            f"opset{of_what} must be from {oldest} to {newest_opset()} (the newest of "
            f"torch {torch.__version__}), got {opset}"
        )
    return opset


def translate(
    program: ExportedProgram,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """The program as a model of standard operators, in which all that can be computed now is."""
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer

    from ._translations import translations

    try:
        exported = torch.onnx.export(
            program,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            custom_translation_table=translations(),
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = error.__cause__ or error
        raise ExportError(f"no ONNX for a part of the model: {_first_line(reason)}") from error
    model = exported.model
    # Weights are sliced and averaged and take in norms here, and not at each start of a session: no
    # limit to the size of what is folded. Norms join convolutions whose weights are initializers.
    anything = 1 << 62
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    optimizer.optimize(model, input_size_limit=anything, output_size_limit=anything)
    _settle_dtypes(model)
    passes.DeduplicateInitializersPass(size_limit=anything)(model)
    foreign = {node.domain for node in model.graph} - {""}
    if foreign or model.functions:
        raise ExportError(f"operators of {', '.join(sorted(foreign))} are not standard ONNX")
    if model.opset_imports[""] != opset:
        raise ExportError(
            f"the graph cannot be converted from opset {model.opset_imports['']} to {opset}"
        )
    # Which line of whose file everything came from says nothing to a runtime.
    for part in chain(model.graph, model.graph.inputs, model.graph.outputs):
        part.metadata_props.clear()
    return model


def name_axes(model: ir.Model, dynamic_shapes: Any) -> None:
    """Gives open axes the names of `torch.export.Dim`, where each input has its own entry."""
    entries = dynamic_shapes.values() if isinstance(dynamic_shapes, dict) else dynamic_shapes or ()
    names = {}
    for value, axes in zip(model.graph.inputs, entries, strict=False):
        axes = axes if isinstance(axes, dict) else dict(enumerate(axes or ()))
        for axis, dim in axes.items():
            name = getattr(dim, "__name__", None)
            if name and not isinstance(value.shape[axis], int):
                names[str(value.shape[axis])] = name
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = chain(model.graph.inputs, *(node.outputs for node in model.graph))
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                value.shape[axis] = symbol.sub(lambda match: names[match[0]], size.value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _settle_dtypes(model: ir.Model) -> None:
    """Folding a norm of bfloat16 into a convolution leaves weights in float32."""
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type == "Conv":
            dtype = node.inputs[0].dtype
            for weight in node.inputs[1:]:
                if weight.const_value.dtype != dtype:
                    narrow = weight.const_value.numpy().astype(dtype.numpy())
                    weight.const_value = ir.tensor(narrow, name=weight.name)
                    weight.dtype = dtype


def write(model: ir.Model, path: Path) -> None:
    """Writes a file that `onnx.checker` accepts."""
    import onnx
    import onnx_ir as ir

    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)


class Session:
    """An ONNX file, or its bytes, under onnxruntime on the CPU; called as the model is."""

    def __init__(self, file: str | os.PathLike | bytes, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"]
        )
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        arrays = [t.numpy(force=True) for t in tensors((args, kwargs))]
        results = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        return tuple(map(torch.from_numpy, results))


class WideSession:
    """The same for a model in bfloat16, which onnxruntime cannot compute with on a CPU: in float32,
    with the same weights, and results rounded at the end."""

    def __init__(self, model: ir.Model) -> None:
        import onnx_ir as ir

        model = model.clone()
        graph = model.graph
        values = chain(graph.inputs, graph.initializers.values(), *(n.outputs for n in graph))
        for value in values:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
                if value.const_value is not None:
                    weights = value.const_value.numpy().astype("float32")
                    value.const_value = ir.tensor(weights, name=value.name)
        for node in graph:
            to = node.attributes.get("to")
            if to is not None and to.value == ir.DataType.BFLOAT16:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        self._session = Session(ir.to_proto(model).SerializeToString())

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        wide = [_convert(t, torch.bfloat16, torch.float32) for t in tensors((args, kwargs))]
        return tuple(_convert(t, torch.float32, torch.bfloat16) for t in self._session(*wide))


def _convert(t: Tensor, old: torch.dtype, new: torch.dtype) -> Tensor:
    return t.to(new) if t.dtype == old else t
