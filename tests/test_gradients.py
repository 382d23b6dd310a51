"""Derivatives of every order and in every mode, for every function and every floating argument."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, TINY, Case, dtype_id, each, randn
from checks import as_function, leaves, standard_arguments, weighted_sum
from layouts import FORMATS
from oracle import EACH_FUNCTION, Function
from tolerances import DTYPES, check
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from cotnet_ext import functional, reference

SOME = tuple(
    CASES[name]
    for name in (
        "odd_9x11",
        "narrow_6x2_k5",
        "k2_grows",
        "k3x5",
        "stride2x1",
        "dilation1x3",
        "padding3_windows_outside",
        "heads2",
        "one_channel_heads2",
        "reflect_heads2_k4",
        "reflect_to_the_edge",
    )
)


def assert_close(
    ours: torch.Tensor, truth: torch.Tensor, name: str, nearby: torch.Tensor | None = None
) -> None:
    """Float64 values of high-order derivatives, judged by the largest of them.

    `nearby` is the truth for arguments one rounding away: what no implementation can be blamed for.
    """
    largest = truth.detach().abs().max().cpu() if truth.numel() else torch.zeros(())
    check(
        ours.detach(),
        truth.detach().cpu(),
        name=name,
        magnitude=(64 * (1 + largest)).to(torch.float64).expand(truth.shape),
        reference=None if nearby is None else nearby.detach(),
    )


# --- by finite differences -----------------------------------------------------------------------


@EACH_FUNCTION
@each(TINY)
@FORMATS
def test_gradcheck(function, case, layout, device):
    """Reverse and forward mode, each also batched, against finite differences of every element."""
    args = leaves(standard_arguments(function, case, device, layout=layout))
    assert gradcheck(
        as_function(function, case),
        args,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@EACH_FUNCTION
@each(SOME)
@FORMATS
def test_gradcheck_in_random_directions(function, case, layout, device):
    args = leaves(standard_arguments(function, case, device, layout=layout))
    assert gradcheck(as_function(function, case), args, check_forward_ad=True, fast_mode=True)


@EACH_FUNCTION
@each(TINY)
def test_gradgradcheck(function, case, device):
    """Reverse over reverse and forward over reverse."""
    args = leaves(standard_arguments(function, case, device))
    assert gradgradcheck(
        as_function(function, case), args, check_fwd_over_rev=True, check_batched_grad=True
    )


@EACH_FUNCTION
@each(SOME)
@FORMATS
def test_gradgradcheck_in_random_directions(function, case, layout, device):
    args = leaves(standard_arguments(function, case, device, layout=layout))
    f = as_function(function, case)
    assert gradgradcheck(f, args, check_fwd_over_rev=True, fast_mode=True)


@EACH_FUNCTION
@each(TINY)
def test_third_order_gradgradcheck(function, case, device):
    """The second derivative is itself twice differentiable."""
    args = leaves(standard_arguments(function, case, device))
    f = as_function(function, case)

    def first_gradients(*args):
        return torch.autograd.grad(weighted_sum(f(*args).pow(2)), args, create_graph=True)

    assert gradgradcheck(first_gradients, args, fast_mode=True)


# --- against the reference -----------------------------------------------------------------------


@EACH_FUNCTION
@each(SOME)
@FORMATS
def test_second_and_third_order_against_the_reference(function, case, layout, device):
    """Nested `torch.autograd.grad`: every order equals that of the plain PyTorch composition."""

    def derivatives(module, args):
        f = as_function(function, case, module)
        found = []
        scalar = weighted_sum(torch.tanh(f(*args)))
        for _ in range(3):
            grads = torch.autograd.grad(scalar, args, create_graph=True)
            found.append(grads)
            scalar = sum(weighted_sum(torch.tanh(g)) for g in grads)
        return found

    args = standard_arguments(function, case, device, layout=layout)
    ours = derivatives(functional, leaves(args))
    exact = standard_arguments(function, case, torch.device("cpu"))
    truth = derivatives(reference, leaves(exact))
    nearby = derivatives(reference, leaves(tuple(arg * (1 + 2**-52) for arg in exact)))
    for order, of_order in enumerate(zip(ours, truth, nearby, strict=True), 1):
        for name, *of_name in zip(function.arguments, *of_order, strict=True):
            left, right, rounded = of_name
            assert_close(left, right, f"{function} order {order} {name}", rounded)


@EACH_FUNCTION
@each(CASES[name] for name in ("odd_9x11", "heads2", "stride2x1", "reflect_heads2_k4"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_second_order_in_every_dtype(function, case, dtype, device):
    """Double backward works in every dtype, returns that dtype, and is no worse than PyTorch."""

    def second(module, dtype, device):
        args = standard_arguments(function, case, device, dtype=expected_dtype)
        args = leaves(tuple(arg.to(dtype) for arg in args))
        y = as_function(function, case, module)(*args)
        first = torch.autograd.grad(weighted_sum(y), args, create_graph=True)
        total = sum(weighted_sum(g) for g in first)
        return torch.autograd.grad(total, args, allow_unused=True, materialize_grads=True)

    expected_dtype = dtype
    ours = second(functional, dtype, device)
    same = second(reference, dtype, torch.device("cpu"))
    truth = second(reference, torch.float64, torch.device("cpu"))
    for name, left, plain, right in zip(function.arguments, ours, same, truth, strict=True):
        largest = right.abs().max().expand(right.shape)
        check(left, right, name=f"{function} {name}", reference=plain, magnitude=64 * largest)


# --- forward mode --------------------------------------------------------------------------------


@EACH_FUNCTION
@each(SOME)
@FORMATS
def test_dual_numbers(function, case, layout, device):
    """`torch.autograd.forward_ad` with tangents on all arguments, and on one at a time."""
    args = standard_arguments(function, case, device, layout=layout)
    tangents = [randn(*arg.shape, key=("tangent", i)).to(device) for i, arg in enumerate(args)]
    f, f_reference = as_function(function, case), as_function(function, case, reference)
    for chosen in (range(len(args)), *([i] for i in range(len(args)))):
        picked = [t if i in chosen else torch.zeros_like(t) for i, t in enumerate(tangents)]
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(arg, tangents[i]) if i in chosen else arg
                for i, arg in enumerate(args)
            ]
            ours = forward_ad.unpack_dual(f(*duals)).tangent
        cpu = [tuple(t.cpu().contiguous() for t in ts) for ts in (args, picked)]
        assert_close(ours, jvp(f_reference, *cpu)[1], f"{function} tangents {list(chosen)}")


# --- torch.func ----------------------------------------------------------------------------------


@EACH_FUNCTION
@each(TINY)
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(function, case, transform, device):
    args = standard_arguments(function, case, device)
    every = tuple(range(len(args)))
    ours = transform(as_function(function, case), argnums=every)(*args)
    truth = transform(as_function(function, case, reference), argnums=every)(
        *(arg.cpu() for arg in args)
    )
    for name, left, right in zip(function.arguments, ours, truth, strict=True):
        assert_close(left, right, f"{function} {transform.__name__} {name}")


@EACH_FUNCTION
@each([CASES["tiny_dilated"]])
def test_hessian(function, case, device):
    """Forward over reverse through `torch.func`: the first two arguments and their mixed block."""
    args = standard_arguments(function, case, device)

    def compute(module, args):
        f = as_function(function, case, module)
        return hessian(lambda *a: weighted_sum(torch.tanh(f(*a))), argnums=(0, 1))(*args)

    ours = compute(functional, args)
    truth = compute(reference, tuple(arg.cpu() for arg in args))
    for i, j in itertools.product(range(2), range(2)):
        assert_close(ours[i][j], truth[i][j], f"{function} hessian {i} {j}")


@EACH_FUNCTION
@each([CASES["odd_9x11"], CASES["reflect_heads2_k4"]])
def test_grad_vjp_jvp(function, case, device):
    """`torch.func.grad`, nested once, `vjp` and `jvp`."""
    args = standard_arguments(function, case, device)
    cpu = tuple(arg.cpu() for arg in args)
    every = tuple(range(len(args)))
    tangents = tuple(randn(*arg.shape, key="tangent") for arg in args)

    def compute(module, args):
        f = as_function(function, case, module)
        first = grad(lambda *a: weighted_sum(f(*a)), argnums=every)
        nested = grad(lambda *a: sum(weighted_sum(torch.tanh(g)) for g in first(*a)), argnums=every)
        y, pull = vjp(f, *args)
        here = tuple(t.to(args[0].device) for t in tangents)
        return (*first(*args), *nested(*args), *pull(torch.ones_like(y)), *jvp(f, args, here))

    for number, (left, right) in enumerate(
        zip(compute(functional, args), compute(reference, cpu), strict=True)
    ):
        assert_close(left, right, f"{function} result {number}")


def _stacked(function: Function, case: Case, device: torch.device, size: int):
    """Arguments with a new dimension of `size` in front."""
    args = standard_arguments(function, case, device)
    return tuple(torch.stack([arg * (1 + i) for i in range(size)]) for arg in args)


@EACH_FUNCTION
@each(CASES[name] for name in ("odd_9x11", "heads2", "stride2x1", "reflect_heads2_k4"))
def test_vmap(function, case, device):
    """vmap over every subset of the arguments, at the front and elsewhere, equals a loop."""
    f = as_function(function, case)
    size = 3
    stacked = _stacked(function, case, device, size)
    for mapped in itertools.product([0, None], repeat=len(stacked)):
        if all(dim is None for dim in mapped):
            continue
        args = tuple(a if dim == 0 else a[0] for a, dim in zip(stacked, mapped, strict=True))
        ours = vmap(f, in_dims=mapped)(*args)
        loop = torch.stack(
            [
                f(*(a[i] if dim == 0 else a for a, dim in zip(args, mapped, strict=True)))
                for i in range(size)
            ]
        )
        assert_close(ours, loop, f"{function} vmap {mapped}")
    moved = tuple(a.movedim(0, -1) for a in stacked)
    ours = vmap(f, in_dims=-1, out_dims=2)(*moved)
    assert_close(ours.movedim(2, 0), vmap(f)(*stacked), f"{function} vmap in_dims=-1")


@EACH_FUNCTION
def test_nested_vmap(function, device):
    case = CASES["odd_9x11"]
    f = as_function(function, case)
    stacked = _stacked(function, case, device, 2)
    twice = tuple(torch.stack((a, 2 * a, 3 * a)) for a in stacked)
    loop = torch.stack(
        [torch.stack([f(*(a[i, j] for a in twice)) for j in range(2)]) for i in range(3)]
    )
    assert_close(vmap(vmap(f))(*twice), loop, f"{function} nested vmap")


@EACH_FUNCTION
@each([CASES["odd_9x11"], CASES["reflect_heads2_k4"]])
def test_per_sample_gradients(function, case, device):
    """vmap of grad, and grad of vmap."""
    size = 3
    stacked = _stacked(function, case, device, size)
    every = tuple(range(len(stacked)))

    def loss(*args):
        return weighted_sum(torch.tanh(as_function(function, case)(*args)))

    ours = vmap(grad(loss, argnums=every))(*stacked)
    loop = [grad(loss, argnums=every)(*(a[i] for a in stacked)) for i in range(size)]
    outer = grad(lambda *args: vmap(loss)(*args).sum(), argnums=every)(*stacked)
    for position, name in enumerate(function.arguments):
        truth = torch.stack([grads[position] for grads in loop])
        assert_close(ours[position], truth, f"{function} per sample {name}")
        assert_close(outer[position], truth, f"{function} grad of vmap {name}")


@EACH_FUNCTION
@each([CASES["odd_9x11"], CASES["heads2"]])
def test_vmap_of_jvp_and_double_backward(function, case, device):
    """Batched tangents, and batched cotangents through the double backward."""
    args = standard_arguments(function, case, device)
    f = as_function(function, case)
    tangents = tuple(randn(3, *arg.shape, key="tangents").to(device) for arg in args)
    ours = vmap(lambda *ts: jvp(f, args, ts)[1])(*tangents)
    loop = torch.stack([jvp(f, args, tuple(t[i] for t in tangents))[1] for i in range(3)])
    assert_close(ours, loop, f"{function} vmap of jvp")
    inputs = leaves(args)
    first = torch.autograd.grad(weighted_sum(f(*inputs)), inputs, create_graph=True)
    total = sum(weighted_sum(torch.tanh(g)) for g in first)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    batched = torch.autograd.grad(
        total, inputs, scales, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    single = torch.autograd.grad(total, inputs, allow_unused=True)
    for name, left, right in zip(function.arguments, batched, single, strict=True):
        assert (left is None) == (right is None), name
        if right is not None:
            truth = torch.stack([scale * right for scale in scales])
            assert_close(left, truth, f"{function} batched double backward {name}")
