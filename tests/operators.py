"""Sample arguments for every registered operator, as direct `torch.ops.cotnet_ext.*` calls get.

`OPERATORS` is read from the library. An operator without an entry in `SAMPLES` fails the tests that
go through all of them, so a new one cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from layouts import LAYOUTS
from oracle import FUSION, GATE, LOCAL, NORM, SOFTMAX, Function, expected

import cotnet_ext  # noqa: F401  (registers the operators)

NAMESPACE = "cotnet_ext::"
OPERATORS = tuple(
    sorted(
        name.removeprefix(NAMESPACE)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(NAMESPACE)
    )
)

COMPUTING = tuple(name for name in OPERATORS if name != "build_info")
EPS = 1e-5
Arguments = tuple[Any, ...]


def operator(name: str) -> Any:
    """The overload `torch.ops.cotnet_ext.<name>.default`."""
    return getattr(torch.ops.cotnet_ext, name).default


def mask_position(name: str) -> int | None:
    """Which argument of the operator says which gradients are wanted, if one does."""
    names = [argument.name for argument in operator(name)._schema.arguments]
    return names.index("output_mask") if "output_mask" in names else None


class Sampler:
    """Makes arguments of one case in one layout, dtype and device; floating ones require grad."""

    def __init__(self, case: Case, layout: str, dtype: torch.dtype, device: torch.device):
        self.case, self.layout, self.dtype, self.device = case, layout, dtype, device

    def tensors(self, function: Function) -> list[torch.Tensor]:
        """The upstream gradient, then the function's arguments."""
        known = expected(function, self.case, self.dtype)
        return [self.leaf(t) for t in (known.grad, *known.tensors.values())]

    def leaf(self, t: torch.Tensor) -> torch.Tensor:
        return LAYOUTS[self.layout](t.to(self.device)).detach().requires_grad_()

    def statistics(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Mean and rstd [N, G*Cw] of the weights, as the forward saves them."""
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        groups = weight.detach().to(acc).flatten(3).flatten(1, 2)
        variance = groups.var(2, unbiased=False)
        return [groups.mean(2), (variance + EPS).rsqrt()]

    def forward(self, function: Function) -> Arguments:
        _, *tensors = self.tensors(function)
        return (*tensors, *self.case.op_geometry) if function.windowed else tuple(tensors)

    def backward(self, function: Function, mask: int) -> Arguments:
        geometry = self.case.op_geometry if function.windowed else ()
        return (*self.tensors(function), *geometry, [True] * mask)


def _local_grad_input(s: Sampler) -> Arguments:
    grad, _, weight = s.tensors(LOCAL)
    return grad, weight, [s.case.height, s.case.width], *s.case.op_geometry


def _local_grad_weight(s: Sampler) -> Arguments:
    grad, x, _ = s.tensors(LOCAL)
    return grad, x, s.case.weight_channels, *s.case.op_geometry


def _norm(s: Sampler) -> Arguments:
    _, *tensors = s.tensors(NORM)
    return *tensors, EPS, *s.case.op_geometry


def _norm_pool(s: Sampler) -> Arguments:
    grad, *tensors = s.tensors(NORM)  # the gradient stands for the map that is pooled as well
    return *tensors, _table(s, grad.shape[1]), grad, EPS, *s.case.op_geometry


def _norm_backward(s: Sampler) -> Arguments:
    grad, x, weight, gamma, beta = s.tensors(NORM)
    statistics = s.statistics(weight)
    return grad, x, weight, *statistics, gamma, beta, *s.case.op_geometry, [True] * 4, EPS


def _gate_backward(s: Sampler) -> Arguments:
    grad, logits, value, _ = s.tensors(GATE)
    return grad, logits, value, [True] * 2


def _table(s: Sampler, *shape: int) -> torch.Tensor:
    """Positive numbers in the type of sums."""
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(sum(shape))
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return numbers.to(dtype).to(s.device).requires_grad_()


def _statistics(s: Sampler) -> Arguments:
    _, x, *_ = s.tensors(FUSION)
    return x, _table(s, x.shape[1]), _table(s, x.shape[1]), EPS


def _batch_norm(s: Sampler) -> Arguments:
    _, x, *_ = s.tensors(FUSION)
    return x, _table(s, 3, x.shape[1]), True


def _batch_norm_backward(s: Sampler) -> Arguments:
    grad, x, *_ = s.tensors(FUSION)
    return grad, x, _table(s, 3, x.shape[1]), _table(s, x.shape[1]), True, True


def _contexts(s: Sampler) -> Arguments:
    _, dynamic, static, _ = s.tensors(FUSION)
    return dynamic, static, _table(s, 3, dynamic.shape[1]), _table(s, 3, dynamic.shape[1])


def _fusion(s: Sampler) -> Arguments:
    contexts = _contexts(s)
    n, c = contexts[0].shape[:2]
    return *contexts, _table(s, n, 2, c)


def _fusion_sums(s: Sampler) -> Arguments:
    grad, *_ = s.tensors(FUSION)
    return grad, *_contexts(s)


def _fusion_backward(s: Sampler) -> Arguments:
    grad, dynamic, static, norm, static_norm = _fusion_sums(s)
    n, c = dynamic.shape[:2]
    arguments = without_grad((grad, dynamic, static, norm, static_norm))
    sums = operator("batch_norm_fusion_sums")(*arguments).requires_grad_()
    factor, attention, pooled = _table(s, c), _table(s, n, 2, c), _table(s, n, c)
    return grad, dynamic, norm, factor, attention, pooled, sums, True


SAMPLES: dict[str, Callable[[Sampler], Arguments]] = {
    "local_aggregation": lambda s: s.forward(LOCAL),
    "local_aggregation_grad_input": _local_grad_input,
    "local_aggregation_grad_weight": _local_grad_weight,
    "local_aggregation_backward": lambda s: (*s.tensors(LOCAL), *s.case.op_geometry),
    "softmax_aggregation": lambda s: s.forward(SOFTMAX),
    "softmax_aggregation_backward": lambda s: s.backward(SOFTMAX, 2),
    "group_norm_aggregation": _norm,
    "group_norm_aggregation_backward": _norm_backward,
    "group_norm_aggregation_pool": _norm_pool,
    "spatial_softmax_gate": lambda s: s.forward(GATE),
    "spatial_softmax_gate_backward": _gate_backward,
    "context_fusion": lambda s: s.forward(FUSION),
    "context_fusion_backward": lambda s: s.backward(FUSION, 3),
    "batch_norm_statistics": _statistics,
    "batch_norm": _batch_norm,
    "batch_norm_backward": _batch_norm_backward,
    "batch_norm_fusion_pool": _contexts,
    "batch_norm_fusion": _fusion,
    "batch_norm_fusion_sums": _fusion_sums,
    "batch_norm_fusion_backward": _fusion_backward,
    "build_info": lambda s: (),
}


def without_grad(args: Arguments) -> Arguments:
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
