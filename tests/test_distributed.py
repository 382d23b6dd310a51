"""Two processes compute what one computes with the joint batch: DDP with batch norms over both
processes, and FSDP2. The processes run distributed_jobs.py, started by torchrun, over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_jobs import EPOCHS, LAYERS, World, main, network, step, training
from documents import ROOT, environment
from training_runs import assert_same_run


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the two processes found."""
    out = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "distributed_jobs.py"), str(out)],
        env={**environment(out), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "found.pt", weights_only=True)


def test_two_processes_train_as_one(found, tmp_path):
    """The curve of the digits example, in single precision; half of each batch in each process."""
    alone = main.train(training(tmp_path / "one", 1), World())
    assert len(alone) == len(found["history"]) == EPOCHS
    for expected, row in zip(alone, found["history"], strict=True):
        # Sums are taken in another order; training amplifies the rounding.
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert row["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-3)
        assert row["top1"] == pytest.approx(expected["top1"], abs=1)
        assert row["lr"] == expected["lr"]
    # The same training without norms over both processes is another one.
    assert abs(alone[-1]["loss"] - alone[0]["loss"]) > 0.1


def test_two_processes_go_on_where_they_stopped(found):
    """Each with its own random numbers: bit for bit the unbroken training."""
    out = Path(found["out"])
    assert_same_run(out / "unbroken", out / "stopped")
    states = torch.load(out / "stopped" / "last.pt", weights_only=True)["random_states"]
    assert len(states) == 2
    assert states[0]["numpy"][1].tolist() != states[1]["numpy"][1].tolist()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["data_parallel", "sharded"])
def test_a_step_of_two_processes_is_one_of_the_joint_batch(found, how, kind):
    """In double precision: parameters, running statistics and counters after an update."""
    alone = network(kind)
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    step(alone)
    after = alone.state_dict()
    assert set(found[how][kind]) == set(after)
    for name, value in after.items():
        torch.testing.assert_close(
            found[how][kind][name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: n + text
        )
    # What a norm takes out again stays where it was; all else has moved.
    moved = [name for name in after if not torch.allclose(after[name], before[name], atol=1e-12)]
    assert {"stem.0.weight", "stem.1.running_var", "head.bias"} <= set(moved)
    assert len(moved) > 0.8 * len(after)


def test_norms_of_one_process_change_the_step(found):
    """The proof above can fail: without norms over both processes the numbers are others."""
    model = network("CotLayer")
    step(model, slice(0, None, 2))
    first = found["data_parallel"]["CotLayer"]["stem.1.running_mean"]
    assert not torch.allclose(model.state_dict()["stem.1.running_mean"], first, rtol=1e-6)
