"""Training steps of the blocks of networks: where they are computed otherwise than module by
module, and that nobody can tell."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import randn
from layers import assert_equal, assert_no_worse, both_layouts, both_modes, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from cotnet_ext import modules, reference
from cotnet_ext.models import create_model
from cotnet_ext.models.blocks import Bottleneck, SplitAttention, shortcut

SHAPE = (6, 16, 7, 6)
PLANES, WIDTH = 4, 16


def block(kind: str, fused: bool, dtype: torch.dtype = torch.float64) -> Bottleneck:
    """One of each kind that networks are made of, whose norms are not at their trivial start."""
    layers = modules if fused else reference
    torch.manual_seed(0)
    pool, projection, drop_path = None, None, 0.0
    attention: Callable[[], nn.Module] = lambda: layers.CotLayer(WIDTH, 3)  # noqa: E731
    if kind == "strided":
        pool = nn.AvgPool2d(3, 2, padding=1)
        projection = shortcut(SHAPE[1], 4 * PLANES, 2, 1, False)
    elif kind == "averaged":
        attention = lambda: SplitAttention(WIDTH, 2, 1, fused)  # noqa: E731
        projection = shortcut(SHAPE[1], 4 * PLANES, 2, 1, True)
    elif kind == "dropped":
        drop_path = 0.5
    made = Bottleneck(SHAPE[1], PLANES, WIDTH, attention, pool, None, projection, drop_path, fused)
    for key, t in [*made.named_parameters(), *made.named_buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            values = randn(*t.shape, key=key) / 2
            t.data.copy_(values.square() + 0.5 if "var" in key else values + ("weight" in key))
    return made.to(dtype)


def both(kind: str, dtype: torch.dtype = torch.float64) -> list[Bottleneck]:
    return [block(kind, fused, dtype) for fused in (True, False)]


def image(dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*SHAPE, dtype=dtype, key="block")


every_kind = pytest.mark.parametrize("kind", ["plain", "strided", "averaged", "dropped"])


def nodes(y: Tensor) -> Iterator[str]:
    """The functions that were recorded for `y`."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name().removesuffix("Backward")
            waiting += [following for following, _ in node.next_functions]


def seeded_run(made: nn.Module, layout=torch.contiguous_format) -> dict[str, Tensor]:
    """`run`, with the samples that a drop path chooses always the same."""
    torch.manual_seed(3)
    return run(made, image(next(made.parameters()).dtype), layout)


# ---- that nobody can tell ------------------------------------------------------------------------


@every_kind
@both_modes
@both_layouts
def test_numbers_are_those_of_the_modules(kind, training, layout):
    ours, theirs = (made.train(training) for made in both(kind))
    for _ in range(2):
        assert_equal(seeded_run(ours, layout), seeded_run(theirs, layout))


@every_kind
def test_which_functions_are_recorded(kind):
    ours, theirs = both(kind)
    x = image().requires_grad_()
    names = list(nodes(ours(x)))
    ends = kind in ("plain", "strided")
    assert (names.count("_Entrance"), names.count("_Exit")) == (ends, ends)
    assert names.count("_Sums") == {"dropped": 2, "averaged": 3}.get(kind, 0)
    assert names.count("_NormRelu") == {"dropped": 2, "averaged": 4}.get(kind, 0)
    assert not {"_Entrance", "_Exit", "_Sums", "_NormRelu", "_Layer"} & set(nodes(theirs(x)))


def test_a_drop_path_that_drops_nothing():
    x = image().requires_grad_()
    assert "_Exit" in set(nodes(block("dropped", True).eval()(x)))
    assert "_Exit" not in set(nodes(block("dropped", True)(x)))


def test_networks_of_both_kinds():
    """The reference is computed module by module, in its stem as well."""
    x = randn(2, 3, 32, 32, dtype=torch.float32, key="image")
    for name in ("cotnet50", "se_cotnetd_50"):
        options = {"features_only": True, "out_indices": (0,)}
        ours, theirs = (create_model(name, reference=plain, **options) for plain in (False, True))
        assert "_NormRelu" in set(nodes(ours(x)[0]))
        assert "_NormRelu" not in set(nodes(theirs(x)[0]))


@every_kind
def test_nothing_is_recorded_otherwise(kind):
    """Without a gradient every module is called, and the result is that of the modules."""
    ours, theirs = (made.float().eval() for made in both(kind))
    theirs.conv2 = ours.conv2
    with torch.no_grad():
        assert torch.equal(ours(image(torch.float32)), theirs(image(torch.float32)))


# ---- what was changed ----------------------------------------------------------------------------


def _swap(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], object]:
    def change(made: nn.Module) -> None:
        torch.manual_seed(5)
        made.set_submodule(path, make(made.get_submodule(path)).double())

    return change


def _hooked(path: str) -> Callable[[nn.Module], object]:
    return lambda made: made.get_submodule(path).register_forward_hook(lambda *a: 2 * a[2])


def _pre_hooked(path: str) -> Callable[[nn.Module], object]:
    return lambda made: made.get_submodule(path).register_forward_pre_hook(lambda _, a: (a[0] / 2,))


def _patched(path: str) -> Callable[[nn.Module], object]:
    def change(made: nn.Module) -> None:
        module = made.get_submodule(path)
        original = module.forward
        module.forward = lambda x: 2 * original(x)

    return change


def _frozen(*paths: str) -> Callable[[nn.Module], object]:
    return lambda made: [made.get_submodule(path).eval() for path in paths]


def _shared(made: nn.Module) -> None:
    made.bn3.bias = made.bn1.bias
    made.downsample[-1] = made.bn3


def _set(path: str, name: str, value: object) -> Callable[[nn.Module], object]:
    return lambda made: setattr(made.get_submodule(path), name, value)


def _without(parameter: str) -> Callable[[nn.Module], object]:
    path, _, name = parameter.rpartition(".")
    return lambda made: made.get_submodule(path).register_parameter(name, None)


class _Last(nn.Module):
    """A map in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def changes(projection: str, norm: str) -> dict[str, Callable[[nn.Module], object]]:
    """What may become of a block, by the paths of the convolution and the norm of its shortcut."""
    norms, convolutions = ("bn1", "bn3", norm), ("conv1", "conv3", projection)
    every = (*norms, *convolutions, "downsample")
    return {
        **{f"{path} hooked": _hooked(path) for path in (*every, "act1", "act3", "drop_path")},
        **{f"{path} pre-hooked": _pre_hooked(path) for path in every},
        **{f"{path} patched": _patched(path) for path in ("bn1", "conv3", "downsample", "act3")},
        **{f"{path} frozen": _frozen(path) for path in norms},
        **{
            f"{path} a GroupNorm": _swap(path, lambda norm: nn.GroupNorm(2, norm.num_features))
            for path in norms
        },
        **{f"{path} cumulative": _set(path, "momentum", None) for path in norms},
        **{f"{path} without a bias": _without(f"{path}.bias") for path in norms},
        "all norms frozen": _frozen(*norms),
        "a norm without running statistics": _swap(
            "bn1", lambda norm: nn.BatchNorm2d(norm.num_features, track_running_stats=False)
        ),
        "a norm without parameters": _swap(
            "bn3", lambda norm: nn.BatchNorm2d(norm.num_features, affine=False)
        ),
        "another activation": _swap("act1", lambda act: nn.Tanh()),
        "another last activation": _swap("act3", lambda act: nn.Tanh()),
        "no activation": _swap("act1", lambda act: nn.Identity()),
        "conv1 has a bias": _swap("conv1", lambda conv: nn.Conv2d(16, 16, 1)),
        "conv1 has groups": _swap("conv1", lambda conv: nn.Conv2d(16, 16, 1, groups=2, bias=False)),
        "conv1 becomes Tanh": _swap("conv1", lambda conv: nn.Tanh()),
        "conv3 looks around": _swap("conv3", lambda conv: nn.Conv2d(16, 16, 3, padding=1)),
        "the shortcut strides one way": _swap(
            "downsample",
            lambda old: nn.Sequential(
                nn.Conv2d(16, 16, 1, (2, 1)),
                nn.AvgPool2d((1, 2), ceil_mode=old[0].kernel_size != (1, 1)),
                nn.BatchNorm2d(16),
            ),
        ),
        "the shortcut looks around": _swap(
            projection, lambda conv: nn.Conv2d(16, 16, 3, conv.stride, 1, bias=False)
        ),
        "the attention leaves channels_last": lambda made: made.set_submodule(
            "conv2", nn.Sequential(made.conv2, nn.Tanh(), _Last())
        ),
        "conv1 has a weight norm": lambda made: parametrizations.weight_norm(made.conv1),
        "conv3 is pruned": lambda made: prune.l1_unstructured(made.conv3, "weight", 0.5),
        "a norm stands in two places": _shared,
    }


CHANGES = [
    pytest.param(kind, change, id=f"{kind}-{what}")
    for kind, *paths in (
        ("strided", "downsample.0", "downsample.1"),
        ("averaged", "downsample.1", "downsample.2"),
    )
    for what, change in changes(*paths).items()
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_changed_modules_are_respected(kind, change):
    ours, theirs = both(kind)
    untouched = seeded_run(block(kind, False))
    change(ours)
    change(theirs)
    expected = seeded_run(theirs)
    assert any(
        key not in expected or not torch.equal(expected[key], value)
        for key, value in untouched.items()
    ), "the change has no effect"
    assert_equal(seeded_run(ours), expected)
    assert_equal(seeded_run(ours.eval()), seeded_run(theirs.eval()))


@pytest.mark.parametrize("kind", ["plain", "strided"])
def test_an_attention_that_leaves_another_layout(kind):
    """After the entrance was fused: the shortcut of the modules then."""
    ours, theirs = both(kind)
    for made in (ours, theirs):
        made.conv2 = nn.Sequential(made.conv2, _Last())
    names = set(nodes(copy.deepcopy(ours)(image())))
    assert "_Entrance" in names and "_Exit" not in names
    assert_equal(run(ours, image()), run(theirs, image()))


def test_one_value_for_each_channel_is_refused():
    """By the norms, at the entrance and behind a stride."""
    for kind, size in (("plain", 1), ("strided", 2)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(kind, True)(image()[:1, :, :size, :size].contiguous())


@pytest.mark.parametrize("kind", ["plain", "strided"])
def test_an_input_without_a_gradient(kind):
    results = []
    for made in both(kind):
        made(image()).square().sum().backward()
        results.append({key: value.grad for key, value in made.named_parameters()})
    assert_equal(*results)


def test_gradients_that_are_kept_stay_as_they_are():
    """What the entrance adds to in place is nobody else's."""
    results = []
    for fused in (True, False):
        first, second = block("strided", fused), block("plain", fused)
        seen: dict[str, Tensor] = {}
        x = image().requires_grad_()
        middle = first(x)
        y = second(middle)
        for name, t in {"middle": middle, "y": y}.items():
            t.retain_grad()
            t.register_hook(lambda grad, name=name, seen=seen: seen.setdefault(name, grad.clone()))
        upstream = randn(*y.shape, key="grad")
        y.backward(upstream)
        assert torch.equal(upstream, randn(*y.shape, key="grad"))
        results.append({"x": x.grad, "y": y.grad, "middle": middle.grad, **seen})
    assert_equal(*results)


@pytest.mark.parametrize("kind", ["plain", "strided"])
@both_modes
def test_batches_of_gradients(kind, training):
    made, x = block(kind, True).train(training), image().requires_grad_()
    inputs = [x, *made.parameters()]
    y = made(x)
    several = torch.stack([randn(*y.shape, key=i) for i in range(3)])
    batched = torch.autograd.grad(y, inputs, several, True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(y, inputs, one, True) for one in several]
    for ours, theirs in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("kind", ["plain", "strided"])
def test_steps_leave_no_tensors(kind):
    made, x, counts = block(kind, True), image().requires_grad_(), []
    for _ in range(3):
        for _ in range(5):
            made(x).sum().backward()
            made(x)  # and one without a backward
        gc.collect()
        counts.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
    assert counts[2] <= counts[0]


@pytest.mark.parametrize("kind", ["plain", "strided"])
def test_gradcheck(kind):
    """Of the first and of the second order, through both ends."""
    torch.manual_seed(0)
    projection = shortcut(3, 4, 2, 1, False) if kind == "strided" else None
    pool = nn.AvgPool2d(2) if projection else None
    made = Bottleneck(3 if projection else 4, 1, 2, nn.Tanh, pool, None, projection, 0.0).double()
    for norm in (made.bn1, made.bn3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(3, made.conv1.in_channels, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in made.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    assert {"_Entrance", "_Exit"} <= set(nodes(function(x, *made.parameters())))
    parameters = [nn.Parameter(value.detach()) for value in made.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


def test_synchronised_norms_in_evaluation():
    ours, theirs = both("strided")
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
    assert type(ours.bn1) is nn.SyncBatchNorm
    assert_equal(run(ours, image()), run(theirs.eval(), image()))


def test_hooks_of_gradients_see_what_they_see():
    seen = []
    for made in both("strided"):
        own = []
        for path in ("conv1", "conv3", "downsample.1"):
            made.get_submodule(path).register_full_backward_hook(
                lambda _, into, out, own=own: own.append((*into, *out))
            )
        run(made, image())
        seen.append(own)
    assert len(seen[0]) == 3
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-9)


# ---- what gradients are taken of, and how --------------------------------------------------------

PARTS = ("input", "conv1", "bn1.weight", "bn1.bias", "conv3", "bn3", "downsample.0", "downsample.1")


@pytest.mark.parametrize("part", PARTS)
def test_subsets_that_need_a_gradient(part):
    made = block("strided", True)
    expected = run(copy.deepcopy(made), image())
    for key, parameter in made.named_parameters():
        parameter.requires_grad_(key.startswith(part))
    x = image().requires_grad_(part == "input")
    y = made(x)
    y.backward(randn(*y.shape, key="grad"))
    for key, tensor in {"input": x, **dict(made.named_parameters())}.items():
        if key.startswith(part):
            torch.testing.assert_close(tensor.grad, expected[key], msg=key)
        else:
            assert tensor.grad is None, key


@every_kind
def test_derivatives_of_the_gradient(kind):
    results = []
    for made in both(kind):
        torch.manual_seed(3)
        x = image().requires_grad_()
        y = made(x)
        (grad,) = torch.autograd.grad(y, x, randn(*y.shape, key="grad"), create_graph=True)
        grad.square().sum().backward()
        found = {key: p.grad for key, p in made.named_parameters() if p.grad is not None}
        results.append({"grad": grad.detach(), "input": x.grad, **found})
    assert_equal(*results)


def test_functional_transforms():
    ours, theirs = (made.eval() for made in both("strided"))
    x, direction = image(), randn(*SHAPE, key="direction")

    def loss(made: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(made, parameters, (x,)).square().sum()

    results = []
    for made in (ours, theirs):
        parameters = {key: 0.5 * value.detach() for key, value in made.named_parameters()}
        gradients = torch.func.grad(lambda p, made=made: loss(made, p, x))(parameters)
        _, slope = torch.func.jvp(
            lambda x, made=made, p=parameters: loss(made, p, x), (x,), (direction,)
        )
        each = torch.func.vmap(lambda x, made=made, p=parameters: loss(made, p, x[None]))(x)
        results.append({**gradients, "slope": slope, "each": each})
    assert_equal(*results)


def test_functional_call_in_training():
    results = []
    for made in both("strided"):
        values = {key: (0.5 * t.detach()).requires_grad_() for key, t in made.named_parameters()}
        y = torch.func.functional_call(made, values, (image(),))
        grads = torch.autograd.grad(y.square().sum(), list(values.values()))
        results.append(dict(zip(values, grads, strict=True)))
    assert_equal(*results)


def test_the_graph_can_be_kept():
    made, x = block("strided", True), image().requires_grad_()
    y, wanted = made(x), [x, *made.parameters()]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y.sum(), wanted), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    """Not much further from the truth than the modules are."""
    truth = run(block("strided", False), image())
    found = [run(made, image(dtype)) for made in both("strided", dtype)]
    expected = {key: truth[key] for key in found[0]}
    assert_no_worse(found[0], expected, found[1])


def test_autocast():
    """As the modules under autocast; gradients come in the dtype of the parameters."""
    truth = run(block("strided", False), image())
    found = []
    for made in both("strided", torch.float32):
        x = image(torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        y.backward(randn(*y.shape, key="grad").to(y.dtype))
        assert all(p.grad.dtype == p.dtype for p in made.parameters())
        grads = {key: p.grad for key, p in made.named_parameters() if key != "conv2.se.0.bias"}
        found.append({"output": y.detach(), "input": x.grad, **grads})
    assert_no_worse(found[0], {key: truth[key] for key in found[0]}, found[1])


def test_copies_and_state():
    made = block("strided", True)
    other = copy.deepcopy(made)
    theirs = block("strided", False)
    assert list(made.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(made.state_dict())
    assert_equal(run(other, image()), run(theirs, image()))
