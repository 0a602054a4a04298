"""One rank of a test group: trains students of several kinds, one after the other, in one process group.

Called as ``python student_worker.py STORE CASE:STAGES ...``, with RANK and WORLD_SIZE in the environment.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from gkd_dist.config import DistillConfig, FitnetLoss, KdLoss, LabelLoss, Loss, ModelConfig
from gkd_dist.distill.engine import DeepSpeedEngine
from gkd_dist.distill.task import TrainTask
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.training import LOSSES, make_task

_LABELS: tuple[Loss, ...] = (LabelLoss(kind="label"), KdLoss(kind="kd"))
_HINT = FitnetLoss(kind="fitnet", teacher_layer=1, student_layer=1)
_PYG = {"norm": "batch_norm", "dropout": 0.3}
CASES: dict[str, tuple[ModelConfig, tuple[Loss, ...]]] = {
    "fitnet": (ModelConfig(kind="gcn", hidden=6, dropout=0.3), (*LOSSES, _HINT)),
    "pyg": (ModelConfig(kind="torch_geometric.nn:GCN", hidden=6, args=_PYG), LOSSES),
    "pna": (ModelConfig(kind="torch_geometric.nn:PNA", hidden=6, args={**_PYG, "jk": "cat"}), LOSSES),
    "edgecnn": (ModelConfig(kind="torch_geometric.nn:EdgeCNN", hidden=6, args=_PYG), LOSSES),
    "whole": (ModelConfig(kind="tests.user_models:Plain"), _LABELS),
    "sampled": (ModelConfig(kind="gat", hidden=6, heads=2, norm="batch", dropout=0.3), (*LOSSES, _HINT)),
    "layered": (ModelConfig(kind="tests.user_models:Layered"), LOSSES),
}


def task_of(storage: Storage, case: str, name: str, stage: int, num_workers: int) -> TrainTask:
    """Ten steps of up to three units, with clipping and weight decay."""
    model, losses = CASES[case]
    train = DistillConfig(
        epochs=10,
        units_per_step=3,
        optimizer="sgd",
        lr=1e-2,
        weight_decay=1e-2,
        grad_clip=0.5,
        zero_stage=stage,
        num_workers=num_workers,
        patience=0,
        eval_every=10,
        fan_out=(3, 2) if case == "sampled" else None,
    )
    return replace(make_task(storage, name, train), model=model, losses=losses)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, buffers and heads; all ranks must call."""
    heads = {f"heads.{name}": value for name, value in trainer.engine.head_state().items()}
    return trainer.engine.model_state() | heads


def main() -> None:
    """Trains and lets rank 0 write the last weights (not the best ones)."""
    store, *jobs = sys.argv[1:]
    world = World.from_env()
    world.connect(60)
    prepare_process(1)
    storage = Storage.open(store)
    for case, stage in ((case, int(stage)) for case, _, stages in (j.partition(":") for j in jobs) for stage in stages):
        name = f"{case}-w{world.world_size}-z{stage}"
        task = task_of(storage, case, name, stage, world.world_size)

        def make(model: torch.nn.Module, steps: int, train: DistillConfig = task.train) -> DeepSpeedEngine:  # type: ignore[assignment]
            return DeepSpeedEngine(model, train, world, steps)

        trainer = Trainer(task, world, make)
        trainer.engine.close, close = lambda: None, trainer.engine.close  # type: ignore[method-assign]
        trainer.run()
        state = state_of(trainer)
        close()
        if world.is_main:
            torch.save(state, f"{storage.local_path()}/{name}.pt")
    world.barrier()
    world.disconnect()


if __name__ == "__main__":
    main()
