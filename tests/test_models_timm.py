"""The networks in timm: names, options, data configuration; and a timm that cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
import torch
from documents import OPERATORS, ROOT

from cotnet_ext.models import CoTNet, CoTNetFeatures, create_model, list_models


def python(code: str, *folders: os.PathLike, check: bool = True) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds this package, and what is in these folders before it."""
    paths = [*map(str, folders), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=check,
    )


def test_all_names_are_registered():
    assert set(list_models()) <= set(timm.list_models("*cot*"))
    assert not set(list_models()) & set(timm.list_models(pretrained=True))
    assert timm.models.get_pretrained_cfg("se_cotnetd_152_L").input_size == (3, 320, 320)


def test_classifier():
    torch.manual_seed(1)
    theirs = timm.create_model("cotnet50", num_classes=10, drop_rate=0.1, drop_path_rate=0.2)
    torch.manual_seed(1)
    ours = create_model("cotnet50", num_classes=10, drop_rate=0.1, drop_path_rate=0.2)
    assert type(theirs) is CoTNet
    assert str(theirs) == str(ours)
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    theirs.eval()
    assert theirs(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_backbone():
    model = timm.create_model("cotnet50", features_only=True, out_indices=(1, 2, 3, -1), in_chans=1)
    assert type(model) is CoTNetFeatures
    maps = model.eval()(torch.rand(1, 1, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 64 // stride, 64 // stride)
        for channels, stride in zip(
            model.feature_info.channels(), model.feature_info.reduction(), strict=True
        )
    ]


@pytest.mark.parametrize(
    ("name", "size", "crop"),
    [("cotnet50", 224, 0.875), ("se_cotnetd_152", 256, 0.888), ("se_cotnetd_152_L", 320, 0.909)],
)
def test_data_configuration(name, size, crop):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    expected = {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop,
    }
    for model in (ours, theirs):
        config = timm.data.resolve_model_data_config(model)
        assert {key: config[key] for key in expected} == expected
        assert model.default_cfg["first_conv"] + ".weight" in model.state_dict()


def test_timm_helpers_understand_the_networks():
    """Groups for weight decay and layer decay, gradient checkpointing, the classifier."""
    from timm.optim import create_optimizer_v2

    model = timm.create_model("se_cotnetd_50", num_classes=10)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.9)
    undecayed = {
        id(p)
        for group in optimizer.param_groups
        if not group["weight_decay"]
        for p in group["params"]
    }
    assert undecayed == {id(p) for p in model.parameters() if p.dim() <= 1}
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    model.reset_classifier(3, "max")
    assert model.get_classifier().out_features == 3


def test_pretrained_says_that_there_is_nothing_to_download(tmp_path):
    with pytest.raises(
        RuntimeError, match="no weights of cotnet50 can be downloaded.*'file': PATH"
    ):
        timm.create_model("cotnet50", pretrained=True)


def test_pretrained_from_a_file(tmp_path):
    model = create_model("se_cotnetd_50")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth.tar")
    overlay = {"file": str(tmp_path / "w.pth.tar")}
    loaded = timm.create_model(
        "se_cotnetd_50", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10
    )
    assert torch.equal(loaded.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    # timm's own way, which wants every key
    again = timm.create_model("se_cotnetd_50", checkpoint_path=overlay["file"])
    assert torch.equal(again.fc.weight, model.fc.weight)


ORDERS = {
    "ours first": "import sys, cotnet_ext.models; assert 'timm' not in sys.modules; import timm",
    "timm first": "import timm, cotnet_ext.models",
    "a part of timm": "import cotnet_ext.models; from timm.models import registry; import timm",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order):
    code = f"{ORDERS[order]}; print(*timm.list_models('*cot*'))"
    assert python(code, OPERATORS).stdout.split() == list_models()


BROKEN = """
import logging
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
import cotnet_ext.models
try:
    import timm
except ImportError as error:
    print("the program sees:", error)
print(len(cotnet_ext.models.list_models()))
"""


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("raise ImportError('torchvision does not fit')", "torchvision does not fit"),
        ("", "timm cannot take the CoTNets"),
    ],
    ids=["fails", "is of another kind"],
)
def test_a_timm_that_cannot_be_used_does_no_harm(tmp_path, init, said):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(init)
    done = python(BROKEN, tmp_path)
    assert done.stdout.endswith("10\n")
    assert ("the program sees: torchvision does not fit" in done.stdout) == bool(init)
    assert said in done.stderr
    assert "DEBUG" in done.stderr


def test_without_timm():
    code = (
        "import sys; sys.modules['timm'] = None; import cotnet_ext.models as m; "
        "print(type(m.create_model('cotnet50', num_classes=3)).__name__)"
    )
    assert python(code).stdout == "CoTNet\n"
