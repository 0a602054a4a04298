"""Loss and gradients of one step, over the whole graph in one process and over parts that stay on their ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gkd_dist.config import DistillConfig, KdLoss, LabelLoss, Loss, LspLoss
from gkd_dist.distill.resident import HOPS, load_share, shares_of
from gkd_dist.distill.step import StepReport, train_step
from gkd_dist.distill.task import TrainTask, build_objective, teacher_wants
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.validation import measure_medians, validate
from gkd_dist.graph import Batch
from gkd_dist.models.build import build_model, resolve_model
from gkd_dist.storage import Storage
from gkd_dist.stream.units import UnitLoader
from gkd_dist.world import World
from tests.training import make_task

DEPTH = 4
STEP = 3  # of which the random numbers are


def structure(layer: int) -> LspLoss:
    """LSP at a layer of the student, against the one layer that the teacher's scores are of."""
    return LspLoss(kind="lsp", weight=0.3, outer_softmax=False, sigma=1.0, teacher_sigma="median", student_layer=layer)


LOSSES: tuple[Loss, ...] = (LabelLoss(kind="label"), KdLoss(kind="kd"), structure(2), structure(-1))


@dataclass(frozen=True)
class Step:
    """One step of a student, and what it ``looks`` like without one; ``sabotage`` names what is taken away."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False
    looks: bool = False
    sabotage: str = ""

    def task(self, store: str) -> TrainTask:
        """On an `uneven_world`, with all separable terms."""
        config = DistillConfig(halo="exchange", checkpoint_layers=self.recompute)
        options = {"layers": DEPTH, "hidden": 6, "dropout": 0.3, "input_dropout": 0.1, **self.model}
        return replace(make_task(Storage.open(store), self.name, config, **options), losses=LOSSES)


class AveragingEngine(TorchEngine):
    """Averages gradients over ranks as an engine does, and keeps them in place of a step."""

    def __init__(self, task: TrainTask, world: World) -> None:
        torch.manual_seed(1)
        meta = task.graph.manifest.meta
        model = build_model(resolve_model(task.model, meta), task.graph.num_features, int(meta["num_classes"]))
        super().__init__(model, task.train, world.device)
        self.world, self.grads = world, dict[str, Tensor]()

    def step(self) -> None:
        for name, parameter in self.module.model.named_parameters():
            assert parameter.grad is not None, name
            self.grads[name] = self.world.sum(parameter.grad) / self.world.world_size


def one_step(task: TrainTask, batches: list[Batch], world: World) -> tuple[StepReport, dict[str, Tensor]]:
    """Values of the terms and gradients of the parameters."""
    engine = AveragingEngine(task, world)
    report = train_step(engine, build_objective(task), batches, world, seed=0, epoch=0, step=STEP)
    return report, engine.grads


def whole_graph(task: TrainTask) -> tuple[StepReport, dict[str, Tensor]]:
    """The same in one process, which has all nodes."""
    return one_step(task, [whole_batch(task)], World())


def whole_batch(task: TrainTask) -> Batch:
    """All parts merged, which puts back what the cut took away."""
    wants = teacher_wants(task.losses, task.teacher_layers)
    loader = UnitLoader(task.graph, task.knowledge, [tuple(range(task.graph.num_parts))], wants)
    batch = loader.load(0)
    assert batch.num_owned == batch.graph.num_nodes, "no halo is left"
    return batch


def measure(world: World, store: str, step: dict[str, Any], out: str) -> None:
    """One step of parts that stay on their ranks; rank 0 writes values and gradients to ``out``."""
    it = Step(**step)
    task = it.task(store)
    wants = teacher_wants(task.losses, task.teacher_layers)
    loader = UnitLoader(task.graph, task.knowledge, shares_of(task.graph, world.world_size), wants, HOPS)
    batch = load_share(loader, world)
    _sabotage(it.sabotage, batch)
    report, grads = one_step(task, [batch], world)
    looked = look(task, batch, world) if it.looks else {}
    if world.is_main:
        torch.save({"means": report.means, "grads": grads, **looked}, out)


def look(task: TrainTask, batch: Batch, world: World) -> dict[str, Any]:
    """Passes without a gradient: metrics per split, and widths from the student's own medians."""
    engine = AveragingEngine(task, world)
    engine.train(False)
    metrics = validate(engine, [batch], 1, batch, world, task.graph.manifest.meta["task"])
    asking = tuple(
        loss.model_copy(update={"sigma": "median"}) if isinstance(loss, LspLoss) else loss for loss in LOSSES
    )
    objective = build_objective(replace(task, losses=asking))
    measure_medians(engine, objective, [batch], 1, batch, world)
    return {"metrics": metrics, "sigmas": objective.student_sigma}


def _sabotage(how: str, batch: Batch) -> None:
    """Takes a mechanism away."""
    halo: Any = batch.graph.halo
    if how == "halo rows are not filled":
        halo.fill = lambda owned: torch.cat(
            [owned, owned.new_zeros(halo.plan.num_nodes - halo.plan.num_owned, owned.size(1))]
        )
    elif how == "gradients stay where they arise":
        fill = halo.fill
        halo.fill = lambda owned: torch.cat([owned, fill(owned.detach())[halo.plan.num_owned :]])
    elif how == "statistics stay local":
        halo.total = lambda values: values
    else:
        assert not how
