"""Models with layers of this package as files for other programs: ONNX, `.pt2`, AOTInductor.

* :func:`onnx`: standard operators only, for onnxruntime, TensorRT, OpenVINO and others.
* :func:`pt2`: a program of ``torch.export``, with the fused operators, or without them for a
  PyTorch that has no ``cotnet_ext``.
* :func:`aoti`: compiled by AOTInductor with the fused operators, for Python and C++.

They take any ``torch.nn.Module`` that has such layers, or calls such functions, anywhere in it.
What they write is first compared with the model, and put in place only then: a file that is there
is whole and right, and one that was there before stays until then. To use an exporter of PyTorch
yourself, pass it :func:`onnx_translations` or :func:`decompositions`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import _onnx
from ._decompositions import decompositions
from ._program import ExportError, check_arguments, compare, forget_sources, replacing, trace

__all__ = ["ExportError", "aoti", "decompositions", "onnx", "onnx_translations", "pt2"]

_Samples = Sequence[tuple]


def onnx(
    model: nn.Module,
    args: tuple,
    path: str | os.PathLike,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    optimize: bool = True,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    samples: _Samples = (),
) -> float:
    """Writes the model as an ONNX file of standard operators.

    The operators of this package become convolutions, products, softmaxes and instance norms;
    weights that do not depend on the input are computed now, and no operator computes with shapes.
    All operators that they become are in the list of TensorRT's parser.

    Args:
        model: in evaluation mode, on any device, in any floating dtype.
        args, kwargs: an example of its arguments. A dynamic dimension must be 2 or more in it.
        path: ends in ``.onnx``.
        dynamic_shapes: what stays open, as :func:`torch.export.export` takes it; batch, height and
            width of every layer may.
        optimize: export ``optimize_for_inference(model)``, in which norms are folded and layers
            fused; results are compared with those of ``model`` itself.
        opset: version of the ONNX operators, 18 or newer; for bfloat16 22 or newer. Default: these.
        input_names, output_names: names in the file, default: those of the program.
        samples: more positional arguments to compare with, of other sizes where they are dynamic.

    Returns:
        The largest distance of a result under onnxruntime from the model's, relative to its norm.

    Raises:
        ExportError: the results differ, or a part of the model has no ONNX operators.
        TypeError, ValueError: an argument is not as above.
    """
    check_arguments(model, args)
    has_bfloat16 = any(t.dtype == torch.bfloat16 for t in model.state_dict().values())
    opset = _onnx.choose_opset(opset, has_bfloat16)
    with replacing(path, ".onnx") as new:
        chosen = _optimized(model, torch.contiguous_format) if optimize else model
        program = trace(chosen, args, kwargs, dynamic_shapes)
        translated = _onnx.translate(program, opset, input_names, output_names)
        _onnx.name_axes(translated, dynamic_shapes)
        _onnx.write(translated, new)
        session = _onnx.Session(new) if not has_bfloat16 else _onnx.WideSession(translated)
        return compare(session, model, _all(args, kwargs, samples), "the ONNX file")


def onnx_translations() -> dict[Callable, Callable]:
    """This package's operators as functions of ONNX operators of opset 18.

    For ``torch.onnx.export(..., dynamo=True, custom_translation_table=onnx_translations())``. Needs
    the extra ``cotnet_ext[export]``.
    """
    from ._translations import translations

    return translations()


def pt2(
    model: nn.Module,
    args: tuple,
    path: str | os.PathLike,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    decompose: bool = False,
    samples: _Samples = (),
) -> float:
    """Writes the model as a program of ``torch.export``, for ``torch.export.load``.

    Args:
        model, args, kwargs, dynamic_shapes, samples: as for :func:`onnx`.
        path: ends in ``.pt2``.
        decompose: without the fused operators. The program then needs PyTorch only, and is slower;
            otherwise ``import cotnet_ext`` must come before loading it.

    Returns, raises: as :func:`onnx`.
    """
    with replacing(path, ".pt2") as new:
        program = _traced(model, args, kwargs, dynamic_shapes, decompose)
        forget_sources(program)
        torch.export.save(program, new)
        loaded = torch.export.load(new).module()
        return compare(loaded, model, _all(args, kwargs, samples), "the program")


def aoti(
    model: nn.Module,
    args: tuple,
    path: str | os.PathLike,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    optimize: bool = True,
    decompose: bool = False,
    samples: _Samples = (),
) -> float:
    """Compiles the model with AOTInductor into a package, for ``torch._inductor.aoti_load_package``
    and C++.

    The package holds machine code for this kind of processor. It calls the fused operators: Python
    programs ``import cotnet_ext`` before they load it, and C++ programs load the library.

    Args:
        model, args, kwargs, dynamic_shapes, optimize, samples: as for :func:`onnx`. The package
            runs on the model's device.
        path: ends in ``.pt2``.
        decompose: without the fused operators. The package then needs libtorch only, and is slower.

    Returns, raises: as :func:`onnx`.
    """
    check_arguments(model, args)
    with replacing(path, ".pt2") as new:
        chosen = _optimized(model) if optimize else model
        program = _traced(chosen, args, kwargs, dynamic_shapes, decompose)
        # Freezing folds norms into convolutions and lays out their weights.
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(new), inductor_configs={"freezing": True}
            )
        loaded = torch._inductor.aoti_load_package(str(new))
        return compare(loaded, model, _all(args, kwargs, samples), "the package")


def _optimized(model: nn.Module, memory_format: torch.memory_format | None = None) -> nn.Module:
    from ..inference import optimize_for_inference

    return optimize_for_inference(model, memory_format=memory_format)


def _traced(
    model: nn.Module, args: tuple, kwargs: dict | None, dynamic_shapes: Any, decompose: bool
) -> torch.export.ExportedProgram:
    program = trace(model, args, kwargs, dynamic_shapes)
    return program.run_decompositions(decompositions()) if decompose else program


def _all(args: tuple, kwargs: dict | None, samples: _Samples) -> list[tuple[tuple, dict]]:
    return [(args, kwargs or {}), *((sample, kwargs or {}) for sample in samples)]
