"""1x1 convolutions as products of matrices, and sums of them, beside PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from benchmarks.memory import peak_extra_bytes
from cotnet_ext._pointwise import pointwise, pointwise_sums

# N, C, H, W: maps that are larger and smaller than the weights, of one pixel, and none.
SIZES = {"wide": (3, 4, 5, 6), "narrow": (3, 12, 1, 2), "one": (2, 8, 1, 1), "none": (0, 4, 3, 3)}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
every_map = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_grouping = pytest.mark.parametrize("groups", (1, 2))


def operands(size, groups, layout=torch.contiguous_format, dtype=torch.float64):
    """Two maps; two sums, of both maps and of the second; biases for the first sum only."""
    c = size[1]
    maps = [torch.randn(size, dtype=dtype).contiguous(memory_format=layout) for _ in range(2)]
    first = [torch.randn(6, c // groups, dtype=dtype) for _ in range(2)]
    second = torch.randn(4, c // groups, dtype=dtype)
    bias = torch.randn(6, dtype=dtype)
    return [t.requires_grad_() for t in (*maps, *first, second, bias)]


def ours(x, z, wx, wz, v, bias, groups):
    return tuple(pointwise_sums([x, z], [[wx, wz], [None, v]], [bias, None], groups))


def theirs(x, z, wx, wz, v, bias, groups):
    def conv(image, weight, bias=None):
        return F.conv2d(image, weight[..., None, None], bias, groups=groups)

    return conv(x, wx, bias) + conv(z, wz), conv(z, v)


@every_map
@every_layout
@every_grouping
def test_values_and_gradients_are_those_of_convolutions(size, layout, groups):
    inputs = operands(size, groups, layout)
    found, expected = ours(*inputs, groups), theirs(*inputs, groups)
    torch.testing.assert_close(found, expected)
    for result, truth in zip(found, expected, strict=True):
        assert result.is_contiguous(memory_format=layout) or result.numel() == 0
        upstream = torch.randn_like(truth)
        torch.testing.assert_close(
            torch.autograd.grad(result, inputs, upstream, allow_unused=True, retain_graph=True),
            torch.autograd.grad(truth, inputs, upstream, allow_unused=True, retain_graph=True),
        )


@every_map
@every_grouping
def test_derivatives_of_any_kind(size, groups):
    inputs = operands(size, groups)

    def function(*tensors):
        return ours(*tensors, groups)

    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_undefined_grad=False
    )
    assert torch.autograd.gradgradcheck(function, inputs)


@every_grouping
@pytest.mark.parametrize("which", range(6))
def test_only_the_gradient_that_is_asked_for(which, groups):
    inputs = [t.detach() for t in operands(SIZES["wide"], groups)]
    inputs[which].requires_grad_()
    found, expected = (
        sum(t.sum() for t in ours(*inputs, groups)),
        sum(t.sum() for t in theirs(*inputs, groups)),
    )
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs[which]), torch.autograd.grad(expected, inputs[which])
    )


@pytest.mark.parametrize("which", range(6))
def test_forward_mode_through_one_operand(which):
    inputs = operands(SIZES["narrow"], 2)
    tangent = torch.randn_like(inputs[which])
    results = []
    with forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], tangent)
        for function in (ours, theirs):
            duals = [forward_ad.unpack_dual(t).tangent for t in function(*inputs, 2)]
            results.append([tangent.new_zeros(()) if t is None else t for t in duals])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(*torch.broadcast_tensors(found, expected))


def test_a_result_may_be_overwritten_in_place():
    inputs = operands(SIZES["wide"], 1)
    first, second = ours(*inputs, 1)
    expected = theirs(*inputs, 1)[0].relu()
    torch.testing.assert_close(first.relu_(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), inputs[0]), torch.autograd.grad(expected.sum(), inputs[0])
    )


def test_no_map_is_copied():
    """The results of a backward and nothing else of the size of a map."""
    x, weight = torch.randn(4, 32, 9, 9, requires_grad=True), torch.randn(32, 32).requires_grad_()
    result = pointwise([x], [weight])
    upstream = torch.randn_like(result)
    peak = peak_extra_bytes(lambda: torch.autograd.grad(result, [x, weight], upstream), "cpu")
    assert peak <= x.nbytes + 5 * weight.nbytes  # the gradients, and four images' shares of one
