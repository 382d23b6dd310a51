"""What only a GPU can show: streams, graphs, races, other devices. Values are checked everywhere
else, on every device."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, dtype_id, each
from layouts import FORMATS, LAYOUTS
from oracle import EACH_FUNCTION, Function, Tensors, evaluate, expected
from test_batch_norm import arguments, in_layout, on_device, outputs
from tolerances import assert_same_bits

from cotnet_ext import _ops, functional

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
# A wide map, tiles of several planes, a map that fits no fast path.
SOME = tuple(CASES[name] for name in ("stage1_64x56x56", "stage4_512x7x7", "odd_9x11"))
CASE = CASES["stage4_512x7x7"]
# Clock cycles of a kernel that only waits: some 100 milliseconds on any GPU.
LONG = 200_000_000


def _arguments(function: Function, case, dtype, layout, device) -> tuple[Tensors, torch.Tensor]:
    """The arguments and the gradient of the output."""
    known = expected(function, case, dtype)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    return tensors, LAYOUTS[layout](known.grad.to(device))


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _assert_same(results: Tensors, known: Tensors, what: str) -> None:
    for name, result in results.items():
        assert_same_bits(result, known[name], f"{what} {name}")


@EACH_FUNCTION
@FORMATS
def test_calls_never_wait_for_the_gpu(function, layout, cuda):
    """Forward and backward are queued, and return, while the GPU is busy with something else."""
    tensors, grad = _arguments(function, CASE, torch.float32, layout, cuda)
    evaluate(function, functional, tensors, grad, CASE)  # what is done once may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    evaluate(function, functional, tensors, grad, CASE)
    done = torch.cuda.Event()
    done.record()
    waited = done.query()
    torch.cuda.synchronize()
    assert not waited


@EACH_FUNCTION
@FORMATS
def test_work_goes_to_the_current_stream(function, layout, cuda):
    """Arguments arrive late on a side stream; a kernel on another stream would see the old ones."""
    tensors, grad = _arguments(function, CASE, torch.float32, layout, cuda)
    known = evaluate(function, functional, tensors, grad, CASE)
    late = {name: torch.zeros_like(t) for name, t in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        for name, t in tensors.items():
            late[name].copy_(t)
        results = evaluate(function, functional, late, grad, CASE)
        torch.cuda.current_stream().synchronize()
    _assert_same(results, known, f"{function} on a side stream")


@EACH_FUNCTION
@each(SOME)
@FORMATS
def test_graphs_compute_anew(function, case, layout, cuda):
    """A captured forward and backward, replayed on other values, gives what a call gives."""
    tensors, grad = _arguments(function, case, torch.bfloat16, layout, cuda)
    other = {name: -0.5 * t for name, t in tensors.items()}
    known = evaluate(function, functional, other, grad, case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # PyTorch asks for a turn on a side stream before capture
        evaluate(function, functional, tensors, grad, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate(function, functional, tensors, grad, case)
    for name, t in tensors.items():
        t.copy_(other[name])
    for _ in range(2):
        for result in results.values():
            if result.data_ptr() != grad.data_ptr():  # the gate's gradient of static is grad
                result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        _assert_same(results, known, f"{function} replayed")


@EACH_FUNCTION
@each(SOME)
@DTYPES
@FORMATS
def test_two_hundred_runs_beside_another_stream(function, case, dtype, layout, cuda):
    """The same bits every time, while a second stream keeps the GPU and its caches busy."""
    tensors, grad = _arguments(function, case, dtype, layout, cuda)
    first = evaluate(function, functional, tensors, grad, case)
    differing = torch.zeros((), dtype=torch.int64, device=cuda)
    noise = torch.randn(1 << 22, device=cuda)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        with torch.cuda.stream(other):
            noise.mul_(1.0001)
            evaluate(function, functional, tensors, grad, case)
        results = evaluate(function, functional, tensors, grad, case)
        for name, result in results.items():
            differing += (_bits(result) != _bits(first[name])).sum()
    torch.cuda.synchronize()
    assert int(differing) == 0


@EACH_FUNCTION
def test_another_device_than_the_current_one(function, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors, grad = _arguments(function, CASE, torch.float32, "contiguous", torch.device("cuda:1"))
    here, grad_here = _arguments(function, CASE, torch.float32, "contiguous", cuda)
    results = evaluate(function, functional, tensors, grad, CASE)
    assert torch.cuda.current_device() == 0
    known = evaluate(function, functional, here, grad_here, CASE)
    for name, result in results.items():
        assert result.device == torch.device("cuda:1")
        assert_same_bits(result.cpu(), known[name].cpu(), f"{function} {name}")


@EACH_FUNCTION
def test_arguments_on_two_devices_are_refused(function, cuda):
    tensors, _ = _arguments(function, CASE, torch.float32, "contiguous", cuda)
    first, second, *_ = function.arguments
    tensors[second] = tensors[second].cpu()
    with pytest.raises(ValueError, match=f"{second} must be on cuda:0 like {first}, got cpu"):
        function.call(functional, tensors, CASE)


@EACH_FUNCTION
@FORMATS
def test_memory_comes_from_pytorchs_allocator(function, layout, cuda):
    """Nothing is allocated behind it: what the driver has left stays the same."""
    tensors, grad = _arguments(function, CASE, torch.float32, layout, cuda)

    def run():
        for _ in range(3):
            evaluate(function, functional, tensors, grad, CASE)
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    run()
    assert run() == run()


def test_grids_of_many_blocks(cuda):
    """More images than the y and z axes of a grid have blocks."""
    batch = 70_001
    x = torch.arange(batch * 8, device=cuda, dtype=torch.float32).view(batch, 8, 1, 1)
    w = torch.full((batch, 1, 8, 9, 1, 1), 2.0, device=cuda)
    for shape in ((batch, 8), (1, batch * 8), (batch * 8, 1)):
        maps = x.view(*shape, 1, 1)
        weights = w.view(shape[0], 1, shape[1], 9, 1, 1)
        y = functional.local_aggregation(maps, weights, 3, padding=1)
        assert torch.equal(y, 2 * maps)
        zeros = torch.zeros_like(maps)
        assert torch.equal(functional.spatial_softmax_gate(zeros, maps, zeros), maps)
        even = torch.zeros(*shape, 2, device=cuda)
        assert torch.equal(functional.context_fusion(maps, maps, even), maps)


# ---- the operators of fused layers ---------------------------------------------------------------

EACH_OPERATOR = pytest.mark.parametrize("name", _ops.BATCH_NORM)
EACH_LAYOUT = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
EACH_SHAPE = pytest.mark.parametrize("shape", [(4, 64, 56, 56), (8, 512, 7, 7), (3, 33, 9, 11)])


def _operands(name: str, shape, dtype, layout, device) -> list:
    return in_layout(on_device(arguments(name, shape, dtype), device), layout)


def _call(name: str, args: list) -> tuple[torch.Tensor, ...]:
    return outputs(getattr(_ops, name)(*args))


def _assert_same_results(results, known, what: str) -> None:
    for result, true in zip(results, known, strict=True):
        assert_same_bits(result.cpu(), true.cpu(), what)


@EACH_OPERATOR
@EACH_LAYOUT
def test_operators_never_wait_for_the_gpu(name, layout, cuda):
    args = _operands(name, (8, 512, 7, 7), torch.float32, layout, cuda)
    _call(name, args)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    _call(name, args)
    done = torch.cuda.Event()
    done.record()
    waited = done.query()
    torch.cuda.synchronize()
    assert not waited


@EACH_OPERATOR
@EACH_LAYOUT
def test_operators_run_on_the_current_stream(name, layout, cuda):
    args = _operands(name, (8, 512, 7, 7), torch.float32, layout, cuda)
    known = _call(name, args)
    late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        for to, a in zip(late, args, strict=True):
            if isinstance(a, torch.Tensor):
                to.copy_(a)
        results = _call(name, late)
        torch.cuda.current_stream().synchronize()
    _assert_same_results(results, known, f"{name} on a side stream")


@EACH_OPERATOR
@EACH_SHAPE
@EACH_LAYOUT
def test_operators_in_graphs_compute_anew(name, shape, layout, cuda):
    args = _operands(name, shape, torch.bfloat16, layout, cuda)
    other = [-0.5 * a if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]
    known = _call(name, other)
    _call(name, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _call(name, args)
    for a, b in zip(args, other, strict=True):
        if a is not b:
            a.copy_(b)
    for _ in range(2):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        _assert_same_results(results, known, f"{name} replayed")


@EACH_OPERATOR
@EACH_SHAPE
@DTYPES
@EACH_LAYOUT
def test_operators_give_the_same_bits_every_time(name, shape, dtype, layout, cuda):
    args = _operands(name, shape, dtype, layout, cuda)
    first = _call(name, args)
    noise, side = torch.randn(1 << 22, device=cuda), torch.cuda.Stream()
    differing = torch.zeros((), dtype=torch.int64, device=cuda)
    for _ in range(50):
        with torch.cuda.stream(side):
            noise.mul_(1.0001)
        for result, known in zip(_call(name, args), first, strict=True):
            differing += (_bits(result) != _bits(known)).sum()
    torch.cuda.synchronize()
    assert int(differing) == 0


@EACH_OPERATOR
def test_operators_on_maps_that_are_not_aligned(name, cuda):
    """Views that begin at an odd element: of contiguous memory, so that nothing is copied."""
    args = _operands(name, (3, 33, 9, 11), torch.bfloat16, torch.contiguous_format, cuda)
    known = _call(name, args)
    moved = []
    for a in args:
        if isinstance(a, torch.Tensor) and a.dim() == 4:
            room = torch.empty(a.numel() + 1, dtype=a.dtype, device=cuda)
            a = room[1:].view(a.shape).copy_(a)
        moved.append(a)
    for result, true in zip(_call(name, moved), known, strict=True):
        torch.testing.assert_close(result, true)


def test_sums_over_many_images(cuda):
    """More images than the y and z axes of a grid have blocks, and one very long map."""
    for shape in ((70_001, 3, 1, 1), (1, 3, 1, 70_001), (2, 1, 3000, 3001)):
        x = torch.full(shape, 2.0, device=cuda)
        for layout in (torch.contiguous_format, torch.channels_last):
            norm, _, variance = _ops.batch_norm_statistics(
                x.contiguous(memory_format=layout), None, None, 1.0
            )
            assert (norm[0] == 2).all() and (norm[1] == 1).all() and (variance == 0).all()
