"""Each layer against its reference: values, gradients, buffers, tools, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import dtype_id, randn
from layers import (
    LAYERS,
    assert_equal,
    assert_no_worse,
    both_layouts,
    both_modes,
    build,
    every_kind,
    every_layer,
    make_input,
    run,
    smooth,
)
from layouts import assert_keeps_format
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cotnet_ext import modules, reference
from cotnet_ext._maps import mean_of_sum

# --- the same layer ------------------------------------------------------------------------------


@every_layer
def test_same_initialisation_and_state(name):
    kind, arguments, _ = LAYERS[name]
    layers = []
    for package in (modules, reference):
        torch.manual_seed(3)
        layers.append(getattr(package, kind)(*arguments))
    ours, theirs = (layer.state_dict() for layer in layers)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    layers[0].load_state_dict(theirs)
    layers[1].load_state_dict(ours)


@both_layouts
@both_modes
@every_layer
def test_values_gradients_and_buffers(name, training, layout):
    ours = build(modules, name).train(training)
    theirs = build(reference, name).train(training)
    x = make_input(name)
    for _ in range(2):  # the second pass starts from moved running statistics
        assert_equal(run(ours, x, layout), run(theirs, x, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@both_layouts
@both_modes
@pytest.mark.parametrize("name", [name for name in LAYERS if not name.endswith("k1")])
def test_narrow_dtypes(name, training, layout, dtype):
    x = make_input(name, dtype)
    ours, theirs = (smooth(build(package, name, dtype)) for package in (modules, reference))
    results = run(ours.train(training), x, layout)
    truth = run(copy.deepcopy(theirs).double().train(training), x.double())
    same = run(theirs.train(training), x, layout)
    assert_no_worse(results, truth, same)


@both_layouts
@every_layer
def test_memory_format_is_kept(name, layout):
    layer = build(modules, name)
    x = make_input(name).contiguous(memory_format=layout)
    assert_keeps_format(layer(x), x, name)
    assert_keeps_format(layer.eval()(x), x, name)


@pytest.mark.parametrize("strides", ["sliced", "transposed", "expanded"])
@every_kind
def test_other_strides(name, strides):
    n, c, h, w = LAYERS[name][2]
    x = {
        "sliced": lambda: randn(n, c + 2, h, w + 3)[:, 1:-1, :, 2:-1],
        "transposed": lambda: randn(n, c, w, h).mT,
        "expanded": lambda: randn(1, c, h, w).expand(n, -1, -1, -1),
    }[strides]()
    expected = build(reference, name).eval()(x.contiguous())
    torch.testing.assert_close(build(modules, name).eval()(x), expected)


@every_kind
def test_an_empty_batch(name):
    layer = build(modules, name).eval()
    x = make_input(name)[:0].requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    for key, p in layer.named_parameters():
        assert torch.equal(p.grad, torch.zeros_like(p)), key


@every_kind
def test_training_stays_together(name):
    layers = [build(package, name) for package in (modules, reference)]
    optimisers = [
        torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for layer in layers
    ]
    for step in range(5):
        x = randn(*LAYERS[name][2], key=("step", step))
        for layer, optimiser in zip(layers, optimisers, strict=True):
            optimiser.zero_grad()
            (layer(x) - x.roll(1, 3)).square().mean().backward()
            optimiser.step()
    ours, theirs = (layer.state_dict() for layer in layers)
    moved = build(reference, name).state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-8, atol=1e-8, msg=key)
    assert not torch.allclose(moved["key_embed.0.weight"], ours["key_embed.0.weight"])


@both_layouts
@both_modes
@every_kind
def test_autocast(name, training, layout):
    x = make_input(name, torch.float32)
    results = []
    for package in (modules, reference):
        layer = smooth(build(package, name, torch.float32)).train(training)
        leaf = x.clone(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaf)
        y.backward(randn(*y.shape, dtype=y.dtype, key="grad"))
        grads = {key: p.grad for key, p in layer.named_parameters()}
        results.append({"output": y.detach(), "input": leaf.grad} | grads)
    ours, theirs = results
    double = smooth(build(reference, name, torch.float32)).double().train(training)
    truth = run(double, x.double())
    assert_no_worse(ours, {key: truth[key] for key in ours}, theirs)


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CoTAttention", "CotLayer", "CoXtLayer"])
def test_second_derivatives(kind):
    torch.manual_seed(0)
    layer = getattr(modules, kind)(16, 3).double().eval()
    names = [key for key, _ in layer.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    x = randn(1, 16, 3, 2).requires_grad_()

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@every_kind
def test_forward_mode(name):
    x, tangent = make_input(name), randn(*LAYERS[name][2], key="tangent")
    ours, theirs = (build(package, name).eval() for package in (modules, reference))
    for actual, expected in zip(
        torch.func.jvp(ours, (x,), (tangent,)),
        torch.func.jvp(theirs, (x,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@every_kind
def test_vmap_over_an_ensemble(name):
    layers = [build(modules, name).eval() for _ in range(3)]
    for i, layer in enumerate(layers):
        for p in layer.parameters():
            p.data.mul_(1 + i / 10)
    state = torch.func.stack_module_state(layers)
    x = make_input(name)

    def call(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    together = torch.func.vmap(call, in_dims=(0, 0, None))(*state, x)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "no_grad"])
@pytest.mark.parametrize("suffix", ["bias", "running_mean"])
@every_kind
def test_vmap_over_one_tensor(name, suffix, recording):
    layer, x = build(modules, name).eval(), make_input(name)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    keys = [key for key in state if key.endswith(suffix)]
    assert keys
    with torch.set_grad_enabled(recording):
        for key in keys:
            several = torch.stack([state[key] + i / 10 for i in range(3)])

            def call(tensor, key=key):
                return torch.func.functional_call(layer, {key: tensor}, (x,))

            together = torch.func.vmap(call)(several)
            torch.testing.assert_close(together, torch.stack([call(one) for one in several]))


@every_kind
def test_gradients_of_a_frozen_part(name):
    ours, theirs = (build(package, name) for package in (modules, reference))
    for layer in (ours, theirs):
        layer.key_embed.requires_grad_(False)
        layer(make_input(name)).square().sum().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if key.startswith("key_embed"):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-8, msg=key)


# --- nothing that need not exist -----------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The operators that run, the largest tensor that one returns, and the shapes of tensors that
    are joined of others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.joined: list[torch.Size] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        self.names.add(name)
        if name in ("aten::cat", "aten::stack"):
            self.joined.append(result.shape)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in outputs if _dense(t)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def _dense(t: object) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided


def recorded(layer: nn.Module, x: Tensor) -> Recorder:
    with Recorder() as recorder:
        layer(x).sum().backward()
    return recorder


@both_layouts
@every_kind
def test_nothing_is_concatenated(name, layout):
    x = make_input(name).contiguous(memory_format=layout).requires_grad_()

    def joined_maps(package) -> list[torch.Size]:
        joined = recorded(build(package, name), x).joined
        return [shape for shape in joined if shape[-2:] == x.shape[-2:]]

    assert joined_maps(modules) == []
    assert joined_maps(reference), "this test cannot see a concatenation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@both_layouts
def test_the_gradient_of_the_pooling_is_a_view(layout, dtype):
    x = randn(2, 16, 7, 6, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    static = x.detach().clone().requires_grad_()
    mean = mean_of_sum(x, static)
    torch.testing.assert_close(mean, (x + static).mean((2, 3), keepdim=True))
    grad, _ = torch.autograd.grad(mean.sum(), [x, static])
    torch.testing.assert_close(grad, torch.full_like(x, 1 / 42))
    assert grad.stride()[2:] == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_the_pooling_of_narrow_maps_stays_in_range(dtype):
    x = torch.full((1, 2, 64, 64), 100.0, dtype=dtype)  # the sum over the map is 409600
    assert torch.equal(mean_of_sum(x, -x / 2), torch.full((1, 2, 1, 1), 50.0, dtype=dtype))


@both_layouts
def test_attention_makes_no_logits_per_tap(layout):
    x = randn(2, 16, 12, 12).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    ours, theirs = (package.CoTAttention(16, 3).double() for package in (modules, reference))
    assert recorded(theirs, x).largest >= 9 * x.numel()
    assert recorded(ours, x).largest <= 2 * x.numel()


@both_layouts
@pytest.mark.parametrize("kind", ["CotLayer", "CoXtLayer"])
def test_the_fused_norm_runs(kind, layout):
    layer = getattr(modules, kind)(16, 3).double()
    x = randn(4, 16, 6, 6).contiguous(memory_format=layout).requires_grad_()
    names = recorded(layer, x).names
    assert "cotnet_ext::group_norm_aggregation" in names
    assert not names & {"aten::native_group_norm", "aten::im2col"}


# --- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "training"),
    [("aot_eager", True), ("aot_eager", False), ("inductor", True)],
    ids=["aot_eager-train", "aot_eager-eval", "inductor-train"],
)
@every_kind
def test_compile(name, backend, training):
    torch._dynamo.reset()
    x = make_input(name, torch.float32)
    layer = build(modules, name, torch.float32).train(training)
    expected = run(copy.deepcopy(layer), x)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    actual = run(compiled, x)
    for (key, value), other in zip(expected.items(), actual.values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-3, msg=key)
    n, c, h, w = x.shape
    other = randn(n + 1, c, h + 3, w + 2, dtype=x.dtype)
    other = other.contiguous(memory_format=torch.channels_last)
    y = compiled(other)
    assert_keeps_format(y, other, name)
    torch.testing.assert_close(y, layer(other), rtol=1e-3, atol=1e-3)


@every_kind
def test_export_with_a_dynamic_map(name):
    layer = build(modules, name).eval()
    x = make_input(name)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.export.export(layer, (x,), dynamic_shapes=(dims,))
    for shape in ((1, x.shape[1], 5, 11), (7, x.shape[1], 12, 4)):
        other = randn(*shape)
        torch.testing.assert_close(program.module()(other), layer(other))


@every_kind
def test_deepcopy_and_pickle(name):
    layer, x = build(modules, name).eval(), make_input(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)


@every_kind
def test_to_another_dtype_and_meta(name):
    layer = build(modules, name).eval()
    assert layer.float()(make_input(name, torch.float32)).dtype == torch.float32
    shape = LAYERS[name][2]
    layer, x = layer.to("meta"), torch.empty(shape, device="meta")
    assert layer(x).shape == shape
    with torch.no_grad():
        assert layer(x).shape == shape


def test_repr():
    assert repr(modules.CoTAttention(16)).startswith("CoTAttention(\n  dim=16, kernel_size=3\n")
    text = repr(modules.LocalConvolution(8, 8, 3, padding=1, pad_mode=1))
    assert text == (
        "LocalConvolution(8, 8, kernel_size=3, stride=1, padding=1, dilation=1, pad_mode=1)"
    )


# --- LocalConvolution and errors -----------------------------------------------------------------


@pytest.mark.parametrize("pad_mode", [0, 1])
def test_local_convolution(pad_mode):
    x, weight = randn(2, 6, 9, 8), randn(2, 2, 3, 15, 5, 4)
    results = []
    for package in (modules, reference):
        layer = package.LocalConvolution(6, 6, (3, 5), 2, (1, 2), pad_mode=pad_mode)
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        y = layer(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not layer.state_dict()


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "pad_mode must be 0", lambda: modules.LocalConvolution(8, 8, 3, pad_mode=2)),
        (TypeError, "pad_mode must be 0", lambda: modules.LocalConvolution(8, 8, 3, pad_mode="")),
        (TypeError, "pad_mode must be 0", lambda: modules.LocalConvolution(8, 8, 3, pad_mode=True)),
        (
            ValueError,
            "dim must be a positive multiple of 4, got 6",
            lambda: modules.CoTAttention(6),
        ),
        (
            ValueError,
            "dim must be a positive multiple of 8, got 12",
            lambda: modules.CotLayer(12, 3),
        ),
        (ValueError, "dim must be a positive multiple of 16", lambda: modules.CoXtLayer(24, 3)),
        (ValueError, "dim must be a positive multiple of 8, got 0", lambda: modules.CotLayer(0, 3)),
        (ValueError, "kernel_size must be a positive odd", lambda: modules.CotLayer(8, 4)),
        (ValueError, "kernel_size must be a positive odd", lambda: modules.CoTAttention(8, -1)),
        (TypeError, "dim must be an int, got 8.0", lambda: modules.CoTAttention(8.0)),
        (TypeError, "kernel_size must be an int", lambda: modules.CotLayer(8, (3, 3))),
    ],
)
def test_constructor_errors(error, message, make):
    with pytest.raises(error, match=message):
        make()


@every_kind
def test_input_errors(name):
    layer = build(modules, name)
    c = LAYERS[name][2][1]
    for shape in ((2, c + 1, 4, 4), (c, 4, 4), (2, 4, 4, c)):
        with pytest.raises(ValueError, match=rf"input must be \[N, {c}, H, W\], got \["):
            layer(randn(*shape))
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        layer([1.0])
