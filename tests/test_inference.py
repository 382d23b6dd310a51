"""optimize_for_inference: what can be done with the copy, compilers, the document."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch._inductor.config
from documents import ROOT, broken_links, run_document
from layers import assert_no_worse
from optimised import Residual, calibrate, small_network
from torch import Tensor, nn

from cotnet_ext import optimize_for_inference

# ---- a copy for evaluation only ------------------------------------------------------------------


def test_it_cannot_be_trained():
    fast = optimize_for_inference(Residual())
    with pytest.raises(RuntimeError, match="train the model that it was made from"):
        fast.train()
    assert not any(module.training for module in fast.modules())
    assert fast.eval() is fast and fast.train(False) is fast
    assert not any(p.requires_grad for p in fast.parameters())
    twin = copy.deepcopy(fast)
    assert twin.eval() is twin


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_copies_and_files(called):
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        expected = optimize_for_inference(model)(x)
        if called:
            fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x), expected)
        file = io.BytesIO()
        torch.save(fast, file)
        size = sum(p.nbytes for p in fast.parameters())
        assert file.tell() < 2 * size + (1 << 18)  # no packed weights in it
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(x), expected)
        with pytest.raises(RuntimeError, match="cannot be trained"):
            loaded.train()
        # Fused once more: nothing is left to do, and nothing is done.
        assert torch.equal(optimize_for_inference(fast)(x), expected)


def test_a_fused_state_dict_loads():
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        expected = fast(x)
        other = optimize_for_inference(small_network()[0])
        for value in other.parameters():
            value.mul_(0.5)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(fast.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_arguments_are_cast(dtype):
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[Tensor], *, extra: dict[str, Tensor], flag: bool) -> list:
            assert flag and extra["count"].dtype == torch.int64
            return [self.conv(image[None]) + extra["bias"] for image in images]

    fast = optimize_for_inference(Detector(), dtype)
    images = [torch.randn(3, 5, 6), torch.randn(3, 4, 4)]
    extra = {"count": torch.arange(3), "bias": torch.ones(1)}
    with torch.no_grad():
        results = fast(images, extra=extra, flag=True)
    assert [r.dtype for r in results] == [dtype] * 2
    assert extra["bias"].dtype == images[0].dtype == torch.float32


def test_a_part_that_is_called_alone_casts_too():
    model, x = small_network()
    fast = optimize_for_inference(model, torch.bfloat16)
    with torch.no_grad():
        assert fast[0](x).dtype == torch.bfloat16
        assert fast[4](torch.randn(2, 16, 6, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": "cotnet50"}, TypeError, "model must be an nn.Module, got str"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype or None, got 'bfloat16'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating dtype .*, got torch.int8"),
        ({"memory_format": "NHWC"}, TypeError, "must be a torch.memory_format, got 'NHWC'"),
        (
            {"memory_format": torch.channels_last_3d},
            ValueError,
            "must be torch.channels_last or torch.contiguous_format, got torch.channels_last_3d",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(**{"model": nn.Identity(), **arguments})


# ---- compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("freezing", [False, True], ids=["compiled", "frozen"])
def test_it_compiles_as_one_graph(freezing):
    x = torch.randn(4, 16, 6, 6)
    model = calibrate(nn.Sequential(Residual()), x)
    fast = optimize_for_inference(model)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        truth = copy.deepcopy(model).double()(x.double())
        assert_no_worse({"output": compiled(x)}, {"output": truth}, {"output": model(x)})


def test_it_exports():
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        fast(x)
        program = torch.export.export(
            fast, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
        )
        targets = {str(node.target) for node in program.graph.nodes}
        assert not any("mkldnn" in target for target in targets)
        other = torch.randn(3, 3, 12, 12)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-3, atol=1e-4)


def test_a_cuda_graph_replays_it(cuda):
    model, x = small_network()
    fast = optimize_for_inference(model.to(cuda), torch.float16)
    x = x.to(cuda)
    with torch.no_grad():
        for _ in range(3):
            expected = fast(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = fast(x)
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(result, expected)


# ---- the document --------------------------------------------------------------------------------


def test_the_document(tmp_path, caplog):
    document = ROOT / "docs" / "inference.md"
    assert broken_links(document) == []
    handlers, logger = list(logging.root.handlers), logging.getLogger("cotnet_ext.inference")
    torch.compiler.reset()
    try:
        with torch._inductor.config.patch(freezing=False):  # restored whatever the document sets
            run_document(document, tmp_path)
    finally:
        logger.setLevel(logging.NOTSET)
        logging.root.handlers[:] = handlers
    assert "replaced 3 by FusedContextualLayer" in caplog.text
