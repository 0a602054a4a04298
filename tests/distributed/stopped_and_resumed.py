"""One rank of a group: a run that goes on from a checkpoint ends with the bits of one that did not stop.

Called as ``python stopped_and_resumed.py STORE STAGES adamw|sgd|frozen PRECISIONS``; all of them in one process.
``sgd`` has no momentum; in a ``frozen`` model the first layer is.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd_dist.config import DistillConfig
from gkd_dist.distill.engine import DeepSpeedEngine
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.distill.wishes import Wishes
from gkd_dist.errors import TerminatedError
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.training import make_task

FROZEN = {"kind": "tests.user_models:PartlyFrozen", "args": {"width": 8}}


def train(
    storage: Storage, name: str, config: DistillConfig, world: World, model: dict[str, Any], stop: bool = False
) -> dict[str, Tensor]:
    """Masters at the end of a run; of one that is asked to ``stop``, at that moment."""
    wishes = Wishes()
    if stop:
        wishes.ask_to_stop()
    task = replace(make_task(storage, name, config, **model), fingerprint="f")
    trainer = Trainer(task, world, lambda model, steps: DeepSpeedEngine(model, config, world, steps), wishes=wishes)
    trainer.engine.close, close = lambda: None, trainer.engine.close
    try:
        trainer.run()
    except TerminatedError:
        assert stop
    state = trainer.engine.model_state()
    close()
    return state


def check(storage: Storage, config: DistillConfig, world: World, model: dict[str, Any]) -> None:
    """Asserts for one configuration."""
    name = f"{config.precision}-{config.zero_stage}"
    calm = train(storage, f"calm-{name}", config, world, model)
    first = train(storage, f"again-{name}", config, world, model, stop=True)
    masters = any(not torch.equal(value, value.bfloat16().float()) for value in first.values())
    assert masters, "weights were rounded to bf16"
    found = train(storage, f"again-{name}", config, world, model)
    for key, value in calm.items():
        assert torch.equal(found[key], value), f"{name}, {key}: {(found[key] - value).abs().max()}"
        assert not key.startswith("first.") or torch.equal(first[key], value), f"{name}: {key} is frozen and has moved"


def main() -> None:
    """Asserts on every rank."""
    store, stages, what, precisions = sys.argv[1:]
    world, storage = World.from_env(), Storage.open(store)
    world.connect(60)
    prepare_process(1)
    for stage, precision in itertools.product(map(int, stages.split(",")), precisions.split(",")):
        config = DistillConfig(
            epochs=4,
            eval_every=4,
            patience=0,
            units_per_step=2,
            lr=1e-2,
            optimizer="sgd" if what == "sgd" else "adamw",
            momentum=0.0,
            zero_stage=stage,
            precision=precision,
            num_workers=world.world_size,
        )
        check(storage, config, world, FROZEN if what == "frozen" else {})
    world.barrier()
    world.disconnect()


if __name__ == "__main__":
    main()
