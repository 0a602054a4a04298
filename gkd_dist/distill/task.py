"""A model to train, as a value: what it is trained on, what its losses read, and whether it is there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gkd_dist import layout
from gkd_dist.config import FitnetLoss, KdLoss, Loss, LspLoss, ModelConfig, TrainConfig, resolve_layer
from gkd_dist.distill.heads import HeadSpec, plan_heads
from gkd_dist.errors import ModelError, NewerModelError
from gkd_dist.losses.bounds import named_losses
from gkd_dist.losses.objective import Objective
from gkd_dist.losses.terms import ScoreKey, score_key
from gkd_dist.models.io import read_model_document
from gkd_dist.models.probe import layer_widths
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.ensemble import Ensemble
from gkd_dist.stream.knowledge import Wants
from gkd_dist.stream.units import UnitLoader


@dataclass(frozen=True)
class TrainTask:
    """One model to train. Small and picklable: it travels to the workers as it is."""

    name: str
    output: Storage  # folder of the model: model.json, model.safetensors, checkpoints/
    graph: GraphStore
    knowledge: tuple[Storage, Manifest] | Ensemble | None
    model: ModelConfig
    losses: tuple[Loss, ...]
    train: TrainConfig
    teacher_layers: int | Mapping[str, int]  # of several teachers by name
    seed: int
    fingerprint: str
    features: str | None = None  # named features of the graph that the model reads, None: ``x``


@dataclass(frozen=True)
class TrainSummary:
    """What a finished run says of itself."""

    name: str
    epochs_run: int
    best_epoch: int
    best_val: float | None
    wall_s: float
    peak_rss_bytes: int
    wait_s: float
    resumed_from_step: int
    extra: dict[str, Any] = field(default_factory=dict)


def teacher_wants(losses: tuple[Loss, ...], teacher_layers: int | Mapping[str, int]) -> Wants:
    """What the terms read of the teacher, or of several."""
    depth = lambda name: teacher_layers if isinstance(teacher_layers, int) else teacher_layers[str(name)]  # noqa: E731
    scores = {
        score_key(resolve_layer(loss.teacher_layer, depth(loss.teacher)), loss.metric, loss.teacher)
        for loss in losses
        if isinstance(loss, LspLoss)
    }
    kd = [loss for loss in losses if isinstance(loss, KdLoss)]
    named = {loss.teacher for loss in kd if loss.teacher is not None}
    embeddings = {
        (resolve_layer(loss.teacher_layer, depth(loss.teacher)), loss.teacher)
        for loss in losses
        if isinstance(loss, FitnetLoss)
    }
    temperatures = {loss.temperature for loss in kd}
    return Wants.of(any(loss.teacher is None for loss in kd), scores, temperatures, named, embeddings)


def build_objective(task: TrainTask) -> Objective:
    """The terms of a task with the teacher's medians filled in."""
    medians: dict[ScoreKey, float] = {}
    if isinstance(task.knowledge, Ensemble):
        for name, (_, manifest) in task.knowledge.stores.items():
            medians |= medians_of(manifest, name)
    elif task.knowledge is not None:
        medians = medians_of(task.knowledge[1], None)
    meta = task.graph.manifest.meta
    return Objective(task.losses, meta["task"], task.teacher_layers, task.model.layers, medians)


def medians_of(manifest: Manifest, teacher: str | None) -> dict[ScoreKey, float]:
    """Median raw scores that a knowledge manifest states."""
    medians = {}
    for key, value in manifest.meta.get("scores", {}).items():
        layer, _, metric = key.partition(".")
        if value["median"] is not None:  # a graph without edges has none
            medians[score_key(int(layer), metric, teacher)] = float(value["median"])
    return medians


def heads_of(task: TrainTask, model: nn.Module, loader: UnitLoader) -> tuple[HeadSpec, ...]:
    """The heads that the losses of a task need between ``model`` and the teacher."""
    hints = [(name, loss) for name, loss in named_losses(task.losses) if isinstance(loss, FitnetLoss)]
    if not hints:
        return ()
    depth = lambda name: task.teacher_layers if isinstance(task.teacher_layers, int) else task.teacher_layers[str(name)]  # noqa: E731
    stored = loader.embedding_widths()
    teachers = {
        name: stored[resolve_layer(loss.teacher_layer, depth(loss.teacher)), loss.teacher] for name, loss in hints
    }
    has_weight = bool(loader.graph.manifest.meta.get("has_edge_weight", False))
    widths = layer_widths(model.eval(), loader.num_features, has_weight, loader.graph.num_edge_features)
    model.train()
    return plan_heads(task.losses, task.model.layers, widths, teachers)


def is_trained(output: Storage, fingerprint: str) -> bool:
    """Whether the folder holds the finished model of this fingerprint."""
    if not output.exists(layout.MODEL_JSON):
        return False
    try:
        return bool(read_model_document(output).get("fingerprint") == fingerprint)
    except NewerModelError:
        raise
    except ModelError:
        return False
