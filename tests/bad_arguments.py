"""The one table of mistakes: a function, a wrong argument, the exception and its message.

In messages `...` stands for anything, and `{w}` for what the function calls its weights (weight or
logits). What came is appended: every message ends in "got" and the offending shape, dtype or value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import dtype_id
from torch import bfloat16, float16, float32, float64, int32


def zeros(*shape: int, dtype: torch.dtype = float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


_WINDOW = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "padding_mode": "zeros"}

# Right arguments of each function; a row below replaces some of them.
RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "local_aggregation": lambda: {
        "input": zeros(2, 64, 14, 14),
        "weight": zeros(2, 1, 8, 9, 14, 14),
        **_WINDOW,
    },
    "softmax_aggregation": lambda: {
        "input": zeros(2, 64, 14, 14),
        "logits": zeros(2, 1, 8, 9, 14, 14),
        **_WINDOW,
    },
    "group_norm_aggregation": lambda: {
        "input": zeros(2, 64, 14, 14),
        "weight": zeros(2, 1, 8, 9, 14, 14),
        "norm_weight": zeros(72),
        "norm_bias": zeros(72),
        "eps": 1e-5,
        **_WINDOW,
    },
    "spatial_softmax_gate": lambda: {
        name: zeros(2, 6, 5, 4) for name in ("logits", "value", "static")
    },
    "context_fusion": lambda: {
        "dynamic": zeros(2, 6, 5, 4),
        "static": zeros(2, 6, 5, 4),
        "logits": zeros(2, 6, 2),
    },
}
_NAMES = dict(zip(("local", "softmax", "norm", "gate", "fusion"), RIGHT, strict=True))
DEVICE = "another device"  # as a value: the right tensor, moved off the others' device


@dataclass(frozen=True)
class Mistake:
    """One wrong call.

    Attributes:
        function: name of the function.
        wrong: the arguments that replace right ones.
        error: the exception's exact type.
        parts: what its message contains, in this order.
    """

    function: str
    wrong: dict[str, Any]
    error: type[Exception]
    parts: tuple[str, ...]

    @property
    def moves_device(self) -> bool:
        return any(value is DEVICE for value in self.wrong.values())

    def arguments(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """All arguments of the call, tensors converted, except those meant to be elsewhere."""
        right = RIGHT[self.function]()
        arguments: dict[str, Any] = {}
        for name, value in (right | self.wrong).items():
            if value is DEVICE:
                value = right[name].to("meta")
            elif isinstance(value, torch.Tensor):
                value = convert(value)
            arguments[name] = value
        return arguments

    def __str__(self) -> str:
        shown = []
        for name, value in self.wrong.items():
            if isinstance(value, torch.Tensor):
                value = "x".join(map(str, value.shape)) + "_" + dtype_id(value.dtype)
            shown.append(f"{name}={value}")
        return f"{self.function}-{'-'.join(shown)}"


MISTAKES: list[Mistake] = []


def _add(error: type[Exception], functions: str, message: str, wrong: dict[str, Any]) -> None:
    """The same mistake in several functions."""
    for short in functions.split():
        weight = "logits" if short == "softmax" else "weight"
        replaced = {weight if name == "w" else name: value for name, value in wrong.items()}
        parts = (
            *message.replace("{w}", weight).split("..."),
            _got(next(iter(wrong.values())), error),
        )
        MISTAKES.append(Mistake(_NAMES[short], replaced, error, parts))


def _got(value: Any, error: type[Exception]) -> str:
    if value is DEVICE:
        return "got meta"
    if isinstance(value, torch.Tensor):
        return f"got {list(value.shape)}" if error is ValueError else f"got {value.dtype}"
    return f"got {value!r}"


def value_error(functions: str, message: str, **wrong: Any) -> None:
    _add(ValueError, functions, message, wrong)


def type_error(functions: str, message: str, **wrong: Any) -> None:
    _add(TypeError, functions, message, wrong)


AGGREGATIONS = "local softmax norm"

# --- shapes --------------------------------------------------------------------------------------

value_error(AGGREGATIONS, "input must be [N, C, H, W]", input=zeros(64, 14, 14))
value_error(AGGREGATIONS, "{w} must be [", w=zeros(2, 8, 9, 14, 14))
# The example of the contract.
_SHAPE = "{w} must be [2, G, Cw, 9, 14, 14] with Cw dividing 64, "
value_error(AGGREGATIONS, _SHAPE, w=zeros(2, 1, 8, 9, 14, 13))
value_error(AGGREGATIONS, _SHAPE, w=zeros(2, 1, 8, 9, 13, 14))
value_error(AGGREGATIONS, _SHAPE, w=zeros(3, 1, 8, 9, 14, 14))
value_error(AGGREGATIONS, _SHAPE, w=zeros(1, 1, 8, 9, 14, 14))
value_error(AGGREGATIONS, _SHAPE, w=zeros(2, 1, 8, 25, 14, 14))
value_error("local softmax", _SHAPE, w=zeros(2, 1, 7, 9, 14, 14))
value_error("local softmax", _SHAPE, w=zeros(2, 1, 128, 9, 14, 14))
value_error("local softmax", _SHAPE, w=zeros(2, 0, 8, 9, 14, 14))
value_error("local softmax", _SHAPE, w=zeros(2, 1, 0, 9, 14, 14))
value_error("norm", "norm_weight must be [72]", norm_weight=zeros(71))
value_error("norm", "norm_weight must be [72]", norm_weight=zeros(), norm_bias=None)
value_error("norm", "norm_bias must be [72]", norm_bias=zeros(72, 1))
value_error("gate", "logits must be [N, C, H, W]", logits=zeros(6, 5, 4))
value_error("gate", "value must be [2, 6, 5, 4]", value=zeros(2, 6, 5, 3))
value_error("gate", "static must be [2, 6, 5, 4]", static=zeros(1, 6, 5, 4))
value_error("fusion", "dynamic must be [N, C, H, W]", dynamic=zeros(6, 5, 4))
value_error("fusion", "static must be [2, 6, 5, 4]", static=zeros(2, 6, 4, 5))
value_error("fusion", "logits must be [2, 6, 2]", logits=zeros(2, 6, 3))
value_error("fusion", "logits must be [2, 6, 2]", logits=zeros(2, 12))
value_error("fusion", "logits must be [2, 6, 2]", logits=zeros(2, 6, 2, 1, 1))

# --- the window ----------------------------------------------------------------------------------

value_error(AGGREGATIONS, "kernel_size must be", kernel_size=0)
value_error("local", "kernel_size must be", kernel_size=(3, -1))
value_error("local", "kernel_size must be...pair", kernel_size=(3, 3, 3))
value_error("local", "stride must be", stride=0)
value_error("local", "stride must be", stride=(1, 0))
value_error("local", "stride must be...pair", stride=())
value_error("local", "padding must be", padding=-1)
value_error("local", "dilation must be", dilation=0)
for _function in ("local_aggregation", "softmax_aggregation", "group_norm_aggregation"):
    MISTAKES.append(
        Mistake(
            _function,
            {"padding_mode": "circular"},
            ValueError,
            ("padding_mode must be", "zeros", "reflect", "got", "circular"),
        )
    )
for _window in ({"kernel_size": 17, "padding": 0}, {"dilation": 8, "padding": 0}):
    MISTAKES.append(
        Mistake("local_aggregation", _window, ValueError, ("kernel_size", "dilation", "14", "got"))
    )
_TOO_WIDE = {"padding_mode": "reflect", "padding": 14, "weight": zeros(2, 1, 8, 9, 40, 40)}
for _function in ("local_aggregation", "group_norm_aggregation"):
    MISTAKES.append(
        Mistake(_function, _TOO_WIDE, ValueError, ("padding must be", "reflect", "got", "14"))
    )

# --- types ---------------------------------------------------------------------------------------

type_error("local", "kernel_size must be", kernel_size=3.0)
type_error("local", "kernel_size must be", kernel_size="3")
type_error("local", "stride must be", stride=(1, 1.5))
type_error("local", "padding must be", padding=None)
type_error("local", "dilation must be", dilation=True)
type_error("local", "padding_mode must be", padding_mode=1)
type_error("norm", "eps must be", eps="small")
type_error("norm", "eps must be", eps=None)
for _functions, _wrong in (
    (AGGREGATIONS, {"input": [[1.0]]}),
    (AGGREGATIONS, {"input": None}),
    (AGGREGATIONS, {"w": None}),
    ("norm", {"norm_weight": 1.0}),
    ("gate", {"logits": None}),
    ("gate", {"value": None}),
    ("gate", {"static": 3}),
    ("fusion", {"static": None}),
    ("fusion", {"logits": 0.5}),
):
    ((_name, _value),) = _wrong.items()
    for _short in _functions.split():
        _argument = _name if _name != "w" else "logits" if _short == "softmax" else "weight"
        _parts = (f"{_argument} must be a Tensor", "got", type(_value).__name__)
        MISTAKES.append(Mistake(_NAMES[_short], {_argument: _value}, TypeError, _parts))

# --- dtypes --------------------------------------------------------------------------------------

_FLOATS = "must be float64, float32, float16 or bfloat16"
for _dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
    type_error(AGGREGATIONS, f"input {_FLOATS}", input=zeros(2, 64, 14, 14, dtype=_dtype))
    type_error("gate", f"logits {_FLOATS}", logits=zeros(2, 6, 5, 4, dtype=_dtype))
    type_error("fusion", f"dynamic {_FLOATS}", dynamic=zeros(2, 6, 5, 4, dtype=_dtype))
_LIKE_INPUT = "{w} must be torch.float32 like input"
type_error(AGGREGATIONS, _LIKE_INPUT, w=zeros(2, 1, 8, 9, 14, 14, dtype=float64))
type_error(AGGREGATIONS, _LIKE_INPUT, w=zeros(2, 1, 8, 9, 14, 14, dtype=bfloat16))
type_error("local", _LIKE_INPUT, w=zeros(2, 1, 8, 9, 14, 14, dtype=int32))
type_error("norm", "norm_bias must be torch.float32", norm_bias=zeros(72, dtype=bfloat16))
type_error("gate", "static must be torch.float32", static=zeros(2, 6, 5, 4, dtype=float16))
type_error("fusion", "logits must be torch.float32", logits=zeros(2, 6, 2, dtype=float64))

# --- devices -------------------------------------------------------------------------------------

value_error(AGGREGATIONS, "{w} must be on...input", w=DEVICE)
value_error("norm", "norm_weight must be on...", norm_weight=DEVICE)
value_error("gate", "value must be on...", value=DEVICE)
value_error("fusion", "logits must be on...", logits=DEVICE)
