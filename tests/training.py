"""A small graph with a teacher's knowledge, and training tasks on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gkd_dist.config import (
    DistillConfig,
    GraphConfig,
    InferConfig,
    KdLoss,
    LabelLoss,
    LspLoss,
    ModelConfig,
    PartitionConfig,
    SyntheticSource,
    TrainConfig,
)
from gkd_dist.data.sources import load_graph
from gkd_dist.distill.task import TrainTask
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage

LOSSES = (
    LabelLoss(kind="label"),
    KdLoss(kind="kd"),
    LspLoss(kind="lsp", weight=0.3, outer_softmax=False, sigma=1.0, teacher_sigma="median"),
)


def small_world(
    root: str | Path, num_parts: int = 3, halo_hops: int = 2, num_nodes: int = 300, embeddings: tuple[int, ...] = ()
) -> Storage:
    """Graph store, untrained teacher and its knowledge (fp32) under ``root``, with ``embeddings`` of these layers."""
    storage = Storage.open(str(root))
    source = SyntheticSource(kind="synthetic", num_nodes=num_nodes, num_classes=3, average_degree=4, num_features=5)
    split = {"kind": "per_class", "train": 8, "val": 8}
    graph = load_graph(GraphConfig.model_validate({"source": source, "split": split}), seed=0)
    config = PartitionConfig(method="random", num_parts=num_parts)
    build_graph_store(graph, storage.child("graph"), config, halo_hops=halo_hops, seed=0, fingerprint="g")
    torch.manual_seed(0)
    spec = ModelSpec(ModelConfig(kind="sage", hidden=8), 5, 3, "multiclass")
    save_model(storage.child("teacher"), build_model(spec.config, 5, 3), spec, "t")
    infer_nodes(
        storage.child("teacher"),
        GraphStore.open(storage.child("graph")),
        storage.child("knowledge"),
        Wants(True, {1: {"sqeuclidean"}}, embeddings),
        InferConfig(num_actors=0, dtype="fp32"),
        fingerprint="k" * 16,
    )
    return storage


def make_task(storage: Storage, name: str = "distilled", train: TrainConfig | None = None, **model: Any) -> TrainTask:
    """A distillation task on a `small_world`."""
    options = {"kind": "gcn", "hidden": 6, "dropout": 0.3} | model
    knowledge = storage.child("knowledge")
    return TrainTask(
        name,
        storage.child(f"students/{name}"),
        GraphStore.open(storage.child("graph")),
        (knowledge, Manifest.load(knowledge, "knowledge")),
        ModelConfig.model_validate(options),
        LOSSES,
        train or DistillConfig(epochs=4, units_per_step=2, checkpoint_every=1, num_workers=1, launcher="inline"),
        2,
        0,
        f"f-{name}",
    )
