"""The autograd graph: only the gradients asked for are computed, and nothing is kept or lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, dtype_id, each
from checks import as_function, leaves, standard_arguments, weighted_sum
from operators import mask_position, operator
from oracle import EACH_FUNCTION, FUNCTIONS, LOCAL, Function, evaluate, expected
from tolerances import DTYPES, check
from torch.utils._python_dispatch import TorchDispatchMode

from cotnet_ext import functional


class OperatorLog(TorchDispatchMode):
    """Collects the calls of our operators as (name, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cotnet_ext":
            self.calls.append((func._schema.name.removeprefix("cotnet_ext::"), args))
        return func(*args, **(kwargs or {}))


# The operator that computes these gradients, when every fused backward takes a mask at its end.
FAMILY_BACKWARD = {
    (True, False): "local_aggregation_grad_input",
    (False, True): "local_aggregation_grad_weight",
    (True, True): "local_aggregation_backward",
}


@EACH_FUNCTION
@each([CASES["odd_9x11"], CASES["reflect_heads2_k4"]])
def test_only_the_gradients_asked_for_are_computed(function, case, device):
    """For every subset of arguments: the same gradients, and no kernel computing another one."""
    known = expected(function, case, torch.float64)
    tensors = {name: t.to(device) for name, t in known.tensors.items()}
    upstream = known.grad.to(device)
    full = evaluate(function, functional, tensors, upstream, case)
    for wanted in itertools.product([False, True], repeat=len(tensors)):
        args = {
            name: t.detach().requires_grad_(asked)
            for (name, t), asked in zip(tensors.items(), wanted, strict=True)
        }
        y = function.call(functional, args, case)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        with OperatorLog() as log:
            y.backward(upstream)
        for (name, arg), asked in zip(args.items(), wanted, strict=True):
            if asked:
                check(
                    arg.grad,
                    full[name].cpu(),
                    name=f"{function} {name} of {wanted}",
                    magnitude=known.magnitude[name],
                )
            else:
                assert arg.grad is None
        _assert_minimal(function, wanted, log.calls)


def _assert_minimal(function: Function, wanted: tuple[bool, ...], calls: list) -> None:
    """At most one operator ran in the backward, and it was told to compute just `wanted`."""
    names = [name for name, _ in calls]
    if function.name == "local_aggregation":
        assert names == [FAMILY_BACKWARD[wanted]]
        return
    if function.name == "spatial_softmax_gate":
        wanted = wanted[:2]  # the gradient of static is the incoming one
        if not any(wanted):
            assert names == []
            return
    assert names == [f"{function.name}_backward"]
    assert tuple(calls[0][1][mask_position(names[0])]) == wanted


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f is not LOCAL], ids=str)
def test_masked_gradients_are_empty(function, device):
    """The raw backward returns a tensor of shape [0] for what its mask leaves out."""
    case = CASES["odd_9x11"]
    with OperatorLog() as log:
        args = leaves(standard_arguments(function, case, device))
        as_function(function, case)(*args).sum().backward()
    name, call = log.calls[-1]
    position = mask_position(name)
    for mask in itertools.product([False, True], repeat=len(call[position])):
        before, after = call[:position], call[position + 1 :]
        results = operator(name)(*before, list(mask), *after)
        complete = operator(name)(*before, [True] * len(mask), *after)
        for asked, result, whole in zip(mask, results, complete, strict=True):
            if asked:
                assert torch.equal(result, whole), (name, mask)
            else:
                assert result.shape == (0,), (name, mask)


# --- the graph -----------------------------------------------------------------------------------


@EACH_FUNCTION
def test_without_grad_mode_there_is_no_graph(function, device):
    args = leaves(standard_arguments(function, CASES["odd_9x11"], device))
    f = as_function(function, CASES["odd_9x11"])
    with torch.no_grad():
        silent = f(*args)
    with torch.inference_mode():
        inference = f(*args)
    assert not silent.requires_grad and silent.grad_fn is None
    assert inference.is_inference()
    assert torch.equal(silent, f(*args)) and torch.equal(inference, silent)


@EACH_FUNCTION
def test_backward_twice(function, device):
    """With retain_graph the second backward repeats the first; without it PyTorch complains."""
    args = leaves(standard_arguments(function, CASES["odd_9x11"], device))
    y = as_function(function, CASES["odd_9x11"])(*args)
    first = torch.autograd.grad(weighted_sum(y), args, retain_graph=True)
    second = torch.autograd.grad(weighted_sum(y), args)
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(weighted_sum(y), args)


@EACH_FUNCTION
def test_changed_arguments_are_noticed(function, device):
    """Changing a saved argument in place before backward is an error, not a wrong gradient."""
    args = [arg * 1 for arg in leaves(standard_arguments(function, CASES["odd_9x11"], device))]
    y = as_function(function, CASES["odd_9x11"])(*args)
    args[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH_FUNCTION
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_have_the_shape_and_dtype_of_the_argument(function, dtype, device):
    args = leaves(standard_arguments(function, CASES["odd_9x11"], device, dtype=dtype))
    as_function(function, CASES["odd_9x11"])(*args).sum().backward()
    for name, arg in zip(function.arguments, args, strict=True):
        assert arg.grad.shape == arg.shape and arg.grad.dtype == dtype, name
        assert arg.grad.device == arg.device


@EACH_FUNCTION
def test_checkpointing(function, device):
    """Activation checkpointing recomputes the forward and finds the same gradients."""
    case = CASES["odd_9x11"]
    args = leaves(standard_arguments(function, case, device))
    f = as_function(function, case)
    plain = torch.autograd.grad(weighted_sum(f(*args)), args)
    again = torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    for left, right in zip(plain, torch.autograd.grad(weighted_sum(again), args), strict=True):
        assert torch.equal(left, right)
