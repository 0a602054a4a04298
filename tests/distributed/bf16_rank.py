"""One rank of a group: in bf16, a run that goes on from a checkpoint ends with the bits of one that did not stop.

Called as ``python bf16_rank.py STORE STAGES``; all stages in one process.
"""

from __future__ import annotations

import sys
from dataclasses import replace

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


def train(storage: Storage, name: str, config: DistillConfig, world: World, stop: bool = False) -> dict[str, Tensor]:
    """Masters at the end of a run; of one that is asked to ``stop``, at that moment."""
    wishes = Wishes()
    if stop:
        wishes.ask_to_stop()
    task = replace(make_task(storage, name, config), fingerprint="f")
    trainer = Trainer(task, world, lambda model, steps: DeepSpeedEngine(model, config, world, steps), wishes=wishes)
    trainer.engine.close, close = lambda: None, trainer.engine.close
    try:
        trainer.run()
    except TerminatedError:
        assert stop
    state = trainer.engine.model_state()
    close()
    return state


def main() -> None:
    """Asserts on every rank."""
    store, stages = sys.argv[1:]
    world, storage = World.from_env(), Storage.open(store)
    world.connect(60)
    prepare_process(1)
    for stage in map(int, stages.split(",")):
        config = DistillConfig(
            epochs=4,
            eval_every=4,
            patience=0,
            units_per_step=2,
            lr=1e-2,
            optimizer="adamw",
            zero_stage=stage,
            precision="bf16",
            num_workers=world.world_size,
        )
        calm = train(storage, f"calm-{stage}", config, world)
        first = train(storage, f"again-{stage}", config, world, stop=True)
        assert any(not torch.equal(value, value.bfloat16().float()) for value in first.values())  # masters, not bf16
        found = train(storage, f"again-{stage}", config, world)
        for name, value in calm.items():
            assert torch.equal(found[name], value), f"stage {stage}, {name}: {(found[name] - value).abs().max()}"
    world.barrier()
    world.disconnect()


if __name__ == "__main__":
    main()
