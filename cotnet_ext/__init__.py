"""cotnet_ext: the operators and layers of Contextual Transformer networks (CoT, arXiv:2107.12292)
as fused kernels.

Functions are in :mod:`cotnet_ext.functional`, modules in :mod:`cotnet_ext.modules`, both
re-exported here; :mod:`cotnet_ext.reference` specifies all of them in plain PyTorch,
:mod:`cotnet_ext.compat` has the official names.
"""

import importlib

from . import (
    _group_norm_aggregation_pool,  # noqa: F401  (registers an operator that programs may hold)
    functional,
    modules,
)
from ._ops import build_info
from ._version import __version__
from .functional import (
    context_fusion,
    group_norm_aggregation,
    local_aggregation,
    softmax_aggregation,
    spatial_softmax_gate,
)
from .modules import CoTAttention, CotLayer, CoXtLayer, LocalConvolution

__all__ = [
    "CoTAttention",
    "CoXtLayer",
    "CotLayer",
    "LocalConvolution",
    "__version__",
    "build_info",
    "context_fusion",
    "functional",
    "group_norm_aggregation",
    "local_aggregation",
    "modules",
    "softmax_aggregation",
    "spatial_softmax_gate",
]

# What most programs do not need is imported when it is first asked for.
_MODULES = ("compat", "export", "models", "reference")
_FUNCTIONS = {"convert": "conversion", "optimize_for_inference": "inference"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_FUNCTIONS])
