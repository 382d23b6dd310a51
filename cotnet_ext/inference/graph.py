"""What follows what inside the modules of a model, and the fusions that this allows.

Each module is traced alone, with its submodules as black boxes, so nothing is assumed about a model
beyond the order in which one `forward` calls its parts. Two kinds of change come of it:

* `fuse_chains` gives a convolution the norm and the activation that its result goes to, and nobody
  else's; identities take their places. The module keeps its class and its own code.
* `fuse_sums` gives a convolution the sum of a residual block and the ReLU behind it, and ReLUs that
  are called more than once or as functions. That changes the code, so a `torch.fx.GraphModule`
  takes the place of the module. It has the attributes of the module, not its class.

A module is not traced when that could go wrong: with hooks, with arguments that may be left out,
when it asks for the types of its arguments or keeps them, and when its way depends on their values.
"""

from __future__ import annotations

import dis
import inspect
import logging
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..modules import _is_plain
from .convolution import FusedConv2d, FusedLinear, fold
from .layers import is_constant_norm

log = logging.getLogger("cotnet_ext.inference")

_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}
_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)
# Modules that return their argument in evaluation; those of timm and others go by their name.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_NOTHING_BY_NAME = ("DropPath",)
# A forward that uses these may take another way for real arguments than for those of the tracer.
_TYPE_QUESTIONS = {"isinstance", "type", "issubclass", "hasattr"}


class _Proxy(fx.Proxy):
    """Records `a += b` as what it is, where `torch.fx` makes a new tensor of it."""


def _in_place(operation: Callable) -> Callable:
    def record(self: _Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _ShallowTracer(fx.Tracer):
    """Follows one `forward`; whatever it calls of its submodules is one node."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(module: nn.Module) -> fx.Graph | None:
    """The calls in `module.forward`, or None where the graph might not say what happens."""
    why = _why_not_traceable(module)
    if why is None:
        try:
            graph = _ShallowTracer().trace(module)
        except Exception as error:  # whatever user code raises when given a proxy
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            if all(node.op != "get_attr" for node in graph.nodes):
                return _without_annotations(graph)
            why = "it uses tensors of its own"
    log.debug("left %s: %s", type(module).__name__, why)
    return None


def _without_annotations(graph: fx.Graph) -> fx.Graph:
    """Types in signatures are strings in some files, and `torch.fx` pickles no such types."""
    for node in graph.nodes:
        node.type = None
    return graph


def _why_not_traceable(module: nn.Module) -> str | None:
    if not _is_plain(module, type(module)):
        return "it has hooks"
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind not in plain or p.default is not p.empty for p in parameters):
        return "arguments may be left out"
    for code in _code(type(module), "forward", set()):
        if _TYPE_QUESTIONS & set(code.co_names):
            return "it asks for the types of its arguments"
        if any(step.opname == "STORE_ATTR" for step in dis.get_instructions(code)):
            return "it stores something in itself"
    return None


def _code(kind: type, name: str, seen: set[str]) -> Iterator[types.CodeType]:
    """The code of a method, and of the others of the class that it mentions."""
    seen.add(name)
    function = inspect.getattr_static(kind, name, None)
    if isinstance(function, types.FunctionType):
        code = inspect.unwrap(function).__code__
        yield code
        for other in code.co_names:
            if other not in seen:
                yield from _code(kind, other, seen)


def class_with_views(model: nn.Module) -> type[nn.Module] | None:
    """A class of `model` whose forward calls `view`, which channels_last maps often do not have."""
    known = ("torch", __package__.partition(".")[0])
    for kind in dict.fromkeys(map(type, model.modules())):
        foreign = kind.__module__.partition(".")[0] not in known
        if foreign and any("view" in code.co_names for code in _code(kind, "forward", set())):
            return kind
    return None


# ---- one pass over a model -----------------------------------------------------------------------


def fuse_chains(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Every convolution of `model` as a `FusedConv2d`, with norm and activation where it may."""
    shared = _shared(model)
    for owner in list(_owners(model)):
        graph = trace(owner)
        if graph is None:
            continue
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            if node.op == "call_module":
                _fuse_chain(owner, node, calls, shared, memory_format)
    for path, conv in list(model.named_modules()):
        if _is_fusable_conv(conv):
            fused = FusedConv2d(conv, conv.weight, conv.bias, None, memory_format)
            model = replace(model, conv, fused, path)
    return model


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that are part of more than one module, or stand in one under several names."""
    counts = Counter(child for module in model.modules() for child in module._modules.values())
    return {module for module, count in counts.items() if count > 1}


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with parts and a forward of their own, not those that were fused already."""
    for module in model.modules():
        # Layers of this package that could not be fused look after their parts themselves.
        ours = type(module).__module__.startswith(f"{__package__.partition('.')[0]}.inference")
        if module._modules and not ours and not isinstance(module, fx.GraphModule):
            yield module


def _fuse_chain(
    owner: nn.Module,
    node: fx.Node,
    calls: Counter,
    shared: set[nn.Module],
    memory_format: torch.memory_format,
) -> None:
    """What follows the convolution or linear layer at `node`, into it."""

    def called_once(path: object) -> nn.Module | None:
        module = owner.get_submodule(path) if calls[path] == 1 else None
        return None if module in shared else module

    def follower(node: fx.Node) -> fx.Node | None:
        """The only user of a result, when it is a module that takes nothing else."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and user.args == (node,) and not user.kwargs else None

    path, first = node.target, called_once(node.target)
    while first is not None and _is_plain(first, nn.Sequential) and len(first):
        # What follows a sequence follows its last part.
        path, first = f"{path}.{len(first) - 1}", first[-1]
        first = None if first in shared else first
    is_linear = first is not None and _is_plain(first, nn.Linear)
    if first is None or not (is_linear or _is_fusable_conv(first)):
        return
    norm = None
    after = follower(node)
    candidate = called_once(after.target) if after is not None else None
    if candidate is not None and _is_norm_of(candidate, first):
        norm = candidate
        owner.set_submodule(after.target, nn.Identity())
        after = follower(after)
    if is_linear:
        if norm is not None:
            owner.set_submodule(path, FusedLinear(first, norm))
            log.debug("folded the norm of %s in %s", path, type(owner).__name__)
        return
    act = _activation(called_once(after.target)) if after is not None else None
    if act is not None:
        owner.set_submodule(after.target, nn.Identity())
    weight, bias = fold(first.weight, first.bias, norm)
    owner.set_submodule(path, FusedConv2d(first, weight, bias, act, memory_format))
    folded = "folded" if norm is not None else "none"
    where = type(owner).__name__
    log.debug("fused %s in %s: norm %s, activation %s", path, where, folded, act or "none")


def _is_norm_of(norm: nn.Module, first: nn.Module) -> bool:
    if isinstance(first, nn.Linear):
        return is_constant_norm(norm, nn.BatchNorm1d) and norm.num_features == first.out_features
    return is_constant_norm(norm, nn.BatchNorm2d) and norm.num_features == first.out_channels


def _activation(module: nn.Module | None) -> str | None:
    kind = type(module)
    return _ACTIVATIONS[kind] if kind in _ACTIVATIONS and _is_plain(module, kind) else None


def _is_fusable_conv(module: nn.Module) -> bool:
    return (
        _is_plain(module, nn.Conv2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def replace(model: nn.Module, old: nn.Module, new: nn.Module, path: str) -> nn.Module:
    """`model` with `new` wherever `old` stands; `new` itself when `old` is the model."""
    if old is model:
        return new
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    log.debug("replaced %s by %s", path, type(new).__name__)
    return model


# ---- sums and functions --------------------------------------------------------------------------


def fuse_sums(model: nn.Module) -> nn.Module:
    """Residual blocks of `model` whose sum and ReLU are part of their last convolution."""
    for path, block in list(model.named_modules()):
        if block is model or isinstance(block, nn.Sequential) or block not in set(_owners(model)):
            continue
        graph = trace(block)
        if graph is None or not _rewrite(block, graph):
            continue
        graph.lint()
        fused = fx.GraphModule(block, graph, class_name=f"Fused{type(block).__name__}")
        _take_attributes(fused, block)
        fused.train(False)
        model = replace(model, block, fused, path)
    return model


def _rewrite(block: nn.Module, graph: fx.Graph) -> bool:
    """Sums and ReLUs into the convolutions that they follow; whether there were any."""
    for node in list(graph.nodes):
        if node.op == "call_module" and _is_nothing(block.get_submodule(node.target)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    changed = False
    for node in list(graph.nodes):
        if _is_sum(node):
            changed |= _fuse_sum(block, graph, node, calls)
    for node in list(graph.nodes):
        if _is_relu(block, node):
            changed |= _fuse_relu(block, graph, node, calls)
    return changed


def _is_nothing(module: nn.Module) -> bool:
    return any(_is_plain(module, kind) for kind in _NOTHING) or (
        type(module).__name__ in _NOTHING_BY_NAME
        and _is_plain(module, type(module))
        and not module.training
    )


def _is_sum(node: fx.Node) -> bool:
    called = (
        node.op == "call_function"
        and node.target in _SUMS
        or node.op == "call_method"
        and node.target in ("add", "add_")
    )
    return (
        called
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(a, fx.Node) for a in node.args)
    )


def _is_relu(block: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_plain(block.get_submodule(node.target), nn.ReLU)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELU_FUNCTIONS


def _bare_conv(block: nn.Module, node: object, calls: Counter) -> FusedConv2d | None:
    """The convolution at `node` when its result goes to one place and nothing is fused yet."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or calls[node.target] > 1:
        return None
    conv = block.get_submodule(node.target)
    bare = type(conv) is FusedConv2d and conv.activation is None
    return conv if bare and len(node.users) == 1 and len(node.args) == 1 else None


def _fuse_sum(block: nn.Module, graph: fx.Graph, node: fx.Node, calls: Counter) -> bool:
    order = {each: place for place, each in enumerate(graph.nodes)}
    left, right = node.args
    # Of two convolutions, the later one: it moves to where the sum was.
    for conv_node, other in sorted([(left, right), (right, left)], key=lambda p: -order[p[0]]):
        if _bare_conv(block, conv_node, calls) is None or conv_node is other:
            continue
        if _writes_to(node, other) and (
            other.op != "call_module" or any(order[user] > order[node] for user in other.users)
        ):
            continue  # somebody may count on what `other += ...` wrote
        between = range(order[conv_node] + 1, order[node])
        users = [user for arg in conv_node.all_input_nodes for user in arg.users]
        if any(order[user] in between and not _is_conv(block, user) for user in users):
            continue  # which may write to the input of the convolution before it is read
        fresh = _is_fresh(block, other, calls)
        with graph.inserting_before(node):
            total = graph.call_module(conv_node.target, (*conv_node.args, other, fresh))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        graph.erase_node(conv_node)
        return True
    return False


def _writes_to(node: fx.Node, other: fx.Node) -> bool:
    """Whether a sum is written to one of its terms."""
    return node.target in (operator.iadd, "add_") and node.args[0] is other


def _is_conv(block: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and type(block.get_submodule(node.target)) is FusedConv2d


def _is_fresh(block: nn.Module, node: fx.Node, calls: Counter) -> bool:
    """Whether a result is a new tensor that goes to one place, which then may write to it."""
    if node.op != "call_module" or len(node.users) > 1 or calls[node.target] > 1:
        return False
    module = block.get_submodule(node.target)
    if _is_plain(module, nn.Sequential):
        parts = [part for part in module if not _is_nothing(part)]
        module = parts[-1] if parts else module
    return type(module) is FusedConv2d


def _fuse_relu(block: nn.Module, graph: fx.Graph, node: fx.Node, calls: Counter) -> bool:
    source = node.args[0] if len(node.args) == 1 else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return False
    conv = block.get_submodule(source.target)
    if type(conv) is not FusedConv2d or conv.activation is not None or calls[source.target] > 1:
        return False
    conv.activation = "relu"
    node.replace_all_uses_with(source)
    graph.erase_node(node)
    return True


def _take_attributes(fused: fx.GraphModule, block: nn.Module) -> None:
    """What others may ask a block for, such as its stride."""
    for name, value in block.__dict__.items():
        if name not in fused.__dict__ and name != "forward":
            fused.__dict__[name] = value
