"""What two processes compute for test_distributed.py: `torchrun ... distributed_jobs.py OUT`.

Both join over gloo; the first writes what they found into OUT/found.pt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from training import main  # noqa: E402
from training.distributed import World, distribute, joined, synchronise_norms  # noqa: E402
from training.options import LAYERS, Options  # noqa: E402

from cotnet_ext.demo.digits import DigitNet, load_digits  # noqa: E402

WIDTH = 16
EPOCHS = 2
BATCH = 24  # of the step, over all processes


def training(out: Path, processes: int, **changes) -> Options:
    """A short training on the digits: 2 x 48 images per update, over all processes."""
    plain = Options(
        out=str(out),
        width=WIDTH,
        epochs=EPOCHS,
        batch_size=48 // processes,
        accumulate=2,
        sched_on_updates=True,
        sync_bn=True,
        tensorboard=False,
    )
    return dataclasses.replace(plain, **changes)


def network(kind: str) -> nn.Module:
    """The same network in every process, in double precision."""
    from cotnet_ext import modules

    torch.manual_seed(0)
    return DigitNet(modules, WIDTH, [kind]).double()


def step(model: nn.Module, share: slice = slice(None)) -> None:
    """One update of SGD on a share of the first digits."""
    digits = load_digits(0)
    images, labels = digits.images[:BATCH][share].double(), digits.labels[:BATCH][share]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def _data_parallel_step(kind: str, world: World) -> dict[str, torch.Tensor]:
    model = synchronise_norms(network(kind), world)
    step(distribute(model, world), slice(world.rank, None, world.size))
    return model.state_dict()


def _sharded_step(kind: str, world: World) -> dict[str, torch.Tensor]:
    """Parameters, gradients and momenta in shards; every layer is gathered when it is used."""
    mesh = init_device_mesh("cpu", (world.size,))
    model = synchronise_norms(network(kind), world)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        local = parameter.to_local()
        assert local.numel() < parameter.numel() or world.size == 1, name
    step(model, slice(world.rank, None, world.size))
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def _stop_and_resume(out: Path, world: World) -> None:
    """A training with random images of each process's own, unbroken and stopped on its way."""
    random = {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.5, "sync_bn": False}
    main.train(training(out / "unbroken", world.size, **random), world)
    epoch = main._epoch

    def stop_after_one(run, log, number, epochs):
        if number:
            raise KeyboardInterrupt
        return epoch(run, log, number, epochs)

    main._epoch = stop_after_one
    with contextlib.suppress(KeyboardInterrupt):
        main.train(training(out / "stopped", world.size, **random), world)
    main._epoch = epoch
    main.train(training(out / "stopped", world.size, **random, resume=True), world)


def run(out: Path, world: World) -> None:
    _stop_and_resume(out, world)
    found = {
        "history": main.train(training(out / "two", world.size), world),
        "data_parallel": {kind: _data_parallel_step(kind, world) for kind in LAYERS},
        "sharded": {kind: _sharded_step(kind, world) for kind in LAYERS},
    }
    if world.first:
        found["out"] = str(out)
        torch.save(found, out / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu") as world:
        run(Path(sys.argv[1]), world)
