"""Derivatives: one ``torch.autograd.Function`` per operator.

``local_aggregation`` and its gradients are derivatives of each other. The other operators have one
fused backward each; what is differentiated beyond that, a backward again or anything in forward
mode, is the same function composed of that family and PyTorch's own operators (``composed_*``).

Each class's ``backward`` and ``setup_context`` are registered for the raw operator as well, so that
a direct ``torch.ops.cotnet_ext.*`` call and a compiled graph are differentiated by the same lines.
"""

from __future__ import annotations

import torch

from .context_fusion import ContextFusion, ContextFusionBackward, composed_context_fusion
from .group_norm_aggregation import (
    GroupNormAggregation,
    GroupNormAggregationBackward,
    composed_group_norm_aggregation,
)
from .local_aggregation import (
    LocalAggregation,
    LocalAggregationBackward,
    LocalAggregationGradInput,
    LocalAggregationGradWeight,
    composed_local_aggregation,
)
from .softmax_aggregation import (
    SoftmaxAggregation,
    SoftmaxAggregationBackward,
    composed_softmax_aggregation,
)
from .spatial_softmax_gate import (
    SpatialSoftmaxGate,
    SpatialSoftmaxGateBackward,
    composed_spatial_softmax_gate,
)

__all__ = [
    "ContextFusion",
    "GroupNormAggregation",
    "LocalAggregation",
    "SoftmaxAggregation",
    "SpatialSoftmaxGate",
    "composed_context_fusion",
    "composed_group_norm_aggregation",
    "composed_local_aggregation",
    "composed_softmax_aggregation",
    "composed_spatial_softmax_gate",
]

for _name, _function in {
    "local_aggregation": LocalAggregation,
    "local_aggregation_grad_input": LocalAggregationGradInput,
    "local_aggregation_grad_weight": LocalAggregationGradWeight,
    "local_aggregation_backward": LocalAggregationBackward,
    "softmax_aggregation": SoftmaxAggregation,
    "softmax_aggregation_backward": SoftmaxAggregationBackward,
    "group_norm_aggregation": GroupNormAggregation,
    "group_norm_aggregation_backward": GroupNormAggregationBackward,
    "spatial_softmax_gate": SpatialSoftmaxGate,
    "spatial_softmax_gate_backward": SpatialSoftmaxGateBackward,
    "context_fusion": ContextFusion,
    "context_fusion_backward": ContextFusionBackward,
}.items():
    torch.library.register_autograd(
        f"cotnet_ext::{_name}", _function.backward, setup_context=_function.setup_context
    )
