"""What the tests of `convert` share: a conversion with its report, and what a model computes."""

from __future__ import annotations

from cases import randn
from torch import Tensor, nn

from cotnet_ext import convert
from cotnet_ext.conversion import Finding


def converted(model: nn.Module) -> tuple[nn.Module, list[Finding]]:
    report: list[Finding] = []
    assert convert(model, report=report) is model
    return model, report


def swapped(report: list[Finding]) -> list[str]:
    return sorted(finding.path for finding in report if finding.replacement)


def settle(model: nn.Module) -> nn.Module:
    """The model with statistics of some data, in float64."""
    model = model.double()
    for key, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            values = randn(*t.shape, key=key) / 4
            t.data.copy_(values.square() + 0.5 if "var" in key else values + ("weight" in key))
    return model


def passes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients of the image and of all parameters, and buffers after one pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    sum((y * randn(*y.shape, key=i)).sum() for i, y in enumerate(outputs)).backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {"input": x.grad}
    results |= {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return results | {key: b.clone() for key, b in model.named_buffers()}
