"""Files that hold a pickled model: what the error says to do must work."""

from __future__ import annotations

import re

import pytest
import torch

from cotnet_ext.checkpoints import CheckpointError
from cotnet_ext.models import create_model


def test_the_advice_for_a_pickled_model_works(tmp_path):
    file, new = tmp_path / "model.pth", tmp_path / "weights.pth"
    model = create_model("cotnet50", num_classes=5)
    torch.save(model, file)
    with pytest.raises(CheckpointError, match="could run any code") as error:
        create_model("cotnet50", num_classes=5, checkpoint=file)
    assert "\n" not in str(error.value)
    load = re.search(r"c = (torch\.load\(.*?\)),", str(error.value))[1]
    save = re.search(r"or (torch\.save\(c\.state_dict\(\), NEW\))", str(error.value))[1]
    names = {"torch": torch, "FILE": file, "NEW": new}
    names["c"] = eval(load, names)
    eval(save, names)
    loaded = create_model("cotnet50", num_classes=5, checkpoint=new).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value)
