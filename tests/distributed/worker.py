"""One rank of a test group: trains the same task at several ZeRO stages in one process group.

Called as ``python worker.py STORE STAGES OPTIMIZER NORM``, with RANK and WORLD_SIZE in the environment.
"""

from __future__ import annotations

import sys

import torch

from gkd_dist.config import DistillConfig
from gkd_dist.distill.engine import DeepSpeedEngine
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.training import make_task


def config(stage: int, optimizer: str, num_workers: int) -> DistillConfig:
    """Steps of up to three units, with clipping and weight decay."""
    return DistillConfig(
        epochs=10,
        units_per_step=3,
        optimizer=optimizer,
        lr=1e-3 if optimizer == "adamw" else 1e-2,
        weight_decay=1e-2,
        grad_clip=0.5,
        zero_stage=stage,
        num_workers=num_workers,
        patience=0,
        eval_every=10,
    )


def main() -> None:
    """Trains and lets rank 0 write the last weights (not the best ones)."""
    store, stages, optimizer, norm = sys.argv[1:]
    world = World.from_env()
    world.connect(60)
    prepare_process(1)
    storage = Storage.open(store)
    for stage in map(int, stages.split(",")):
        train = config(stage, optimizer, world.world_size)
        name = f"w{world.world_size}-z{stage}-{optimizer}-{norm}"
        task = make_task(storage, name, train, norm=norm)

        def make(model: torch.nn.Module, steps: int, train: DistillConfig = train) -> DeepSpeedEngine:
            return DeepSpeedEngine(model, train, world, steps)

        trainer = Trainer(task, world, make)
        trainer.engine.close, close = lambda: None, trainer.engine.close
        trainer.run()
        state = trainer.engine.model_state()
        close()
        if world.is_main:
            torch.save(state, f"{storage.local_path()}/{name}.pt")
    world.barrier()
    world.disconnect()


if __name__ == "__main__":
    main()
