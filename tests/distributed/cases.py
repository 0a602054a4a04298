"""The cases of C2b: a graph with everything that makes ranks unequal, and options that could tell how many there are.

Shared by the test, which trains each case with plain torch, and by the ranks, which train it with DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gkd_dist.config import DistillConfig, InferConfig, ModelConfig, PartitionConfig, SyntheticSource
from gkd_dist.config.deepspeed import ZERO_ALLOWED
from gkd_dist.config.graph import GraphConfig
from gkd_dist.data.sources import load_graph
from gkd_dist.distill.task import TrainTask
from gkd_dist.graph import Graph
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage
from tests.training import make_task

SIZES = (80, 50, 40, 20, 10)  # nodes of each part
NO_LABELS, NO_EDGES = 3, 4  # parts
STEPS = 10


@dataclass(frozen=True)
class Case:
    """One way to train; ``sabotage`` names the mechanism that is taken away (`tests.distributed.ranks`)."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    sabotage: str = ""

    def config(self, stage: int, num_workers: int) -> DistillConfig:
        """``STEPS`` steps of this case."""
        options = {"weight_decay": 1e-2, "units_per_step": "all", "epochs": STEPS} | self.train
        given = self.train.get("deepspeed", {}).get("zero_optimization", {})
        read = {key: value for key, value in given.items() if stage in ZERO_ALLOWED[key][1]}
        options |= {"deepspeed": {"zero_optimization": read} if read else {}}
        return DistillConfig.model_validate(
            {"zero_stage": stage, "num_workers": num_workers, "patience": 0, "eval_every": STEPS, **options}
        )

    def task(self, storage: Storage, name: str, train: DistillConfig) -> TrainTask:
        """The task of this case on an `uneven_world`."""
        return make_task(storage, name, train, **{"dropout": 0.3, "hidden": 8, **self.model})


def sgd(**options: Any) -> dict[str, Any]:
    """SGD with momentum."""
    return {"optimizer": "sgd", "momentum": 0.9, "lr": 1e-2, **options}


def adamw(**options: Any) -> dict[str, Any]:
    """AdamW; its learning rate bounds what it makes of a gradient that is nothing but rounding."""
    return {"optimizer": "adamw", "lr": 1e-3, **options}


THREE = {
    "units_per_step": 3,
    "epochs": STEPS // 2,
}  # steps of 3 and of 2 units: empty micro-steps, and fewer than 4 ranks
CASES = {
    case.name: case
    for case in (
        Case("sgd-layer-clipped", sgd(grad_clip=0.5, **THREE), {"norm": "layer"}),
        Case("sgd-batch-unclipped", sgd(grad_clip=1e6), {"norm": "batch"}),
        Case("adamw-layer-clipped", adamw(grad_clip=0.1), {"norm": "layer", "dropout_mask": "unit"}),
        Case("adamw-batch-no-clip", adamw(**THREE, lr_schedule={"kind": "cosine", "warmup": 2}), {"norm": "batch"}),
        Case(
            "adamw-embedding",
            adamw(deepspeed={"zero_optimization": {"reduce_bucket_size": 500}}, **THREE),  # below the table's size
            {"node_embedding": 4},
        ),
    )
}
LESS_STATE = {
    case.name: case
    for case in (
        Case("sgd-without-momentum", sgd(momentum=0.0, **THREE)),
        Case("adamw-partly-frozen", adamw(**THREE), {"kind": "tests.user_models:PartlyFrozen", "args": {"width": 8}}),
    )
}
ZERO_OPTIONS: dict[str, Any] = {  # a value that is not the default, for each that may be handed to DeepSpeed
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 100,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 100,
    "compute_grad_norm": False,
    "parameter_alignment": True,
    "ignore_unused_parameters": False,
    "sub_group_size": 100,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 50,
    "stage3_max_reuse_distance": 0,
    "stage3_module_granularity_threshold": 100,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
}


def with_option(name: str) -> Case:
    """A case with one of `ZERO_OPTIONS`."""
    option = {"zero_optimization": {name: ZERO_OPTIONS[name]}}
    return Case(f"option-{name}", adamw(deepspeed=option, **THREE), {"node_embedding": 4})


CLIPS = {"unclipped": 1e6, "clipped": 0.1, "no-clip": None}
PRODUCT = {
    name: Case(name, make(grad_clip=limit, weight_decay=decay, **units), {"norm": norm, "dropout": dropout})
    for optimizer, make in (("sgd", sgd), ("adamw", adamw))
    for norm in ("layer", "batch")
    for clip, limit in CLIPS.items()
    for decay, dropout in ((0.0, 0.0), (1e-2, 0.3))
    for count, units in (("all", {}), ("three", THREE))
    if (name := f"{optimizer}-{norm}-{clip}-{'regular' if decay else 'plain'}-{count}")
}


def sabotaged(case: Case, how: str) -> Case:
    """``case`` without the mechanism ``how``."""
    return replace(case, sabotage=how)


def is_meaningless(case: Case, name: str) -> bool:
    """Whether the gradient of this parameter is analytically zero: its value and its moments are rounding.

    Batch norm takes the mean away, and with it the bias of the convolution before it. SGD leaves it at nothing, Adam
    turns it into steps; then the mean that batch norm keeps differs by that bias, too.
    """
    if case.model.get("norm") != "batch":
        return False
    drifts = case.train["optimizer"] != "sgd"
    return "convs.0.bias" in name or (drifts and name == "norms.0.running_mean")


def uneven_world(root: str | Path, halo_hops: int = 2, average_degree: int = 5) -> Storage:
    """Graph store and knowledge of five unequal parts, one without labels and one without edges."""
    storage = Storage.open(str(root))
    graph, assign = uneven_graph(average_degree)
    with patch("gkd_dist.partition.build.assign_parts", lambda *options: assign):  # none of the methods cuts like this
        config = PartitionConfig(num_parts=len(SIZES))
        build_graph_store(graph, storage.child("graph"), config, halo_hops=halo_hops, seed=0, fingerprint="g")
    torch.manual_seed(0)
    spec = ModelSpec(ModelConfig(kind="sage", hidden=8), 5, 3, "multiclass")
    save_model(storage.child("teacher"), build_model(spec.config, 5, 3), spec, "t")
    parts, wants = GraphStore.open(storage.child("graph")), Wants(True, {1: {"sqeuclidean", "cosine"}})
    settings = InferConfig(num_actors=0, dtype="fp32")
    infer_nodes(storage.child("teacher"), parts, storage.child("knowledge"), wants, settings, fingerprint="k" * 16)
    return storage


def uneven_graph(average_degree: int = 5) -> tuple[Graph, torch.Tensor]:
    """The graph, and the part of each node."""
    assign = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    assign = assign[torch.randperm(assign.numel(), generator=torch.Generator().manual_seed(0))]
    source = SyntheticSource(
        kind="synthetic", num_nodes=assign.numel(), num_classes=3, average_degree=average_degree, num_features=5
    )
    split = {"kind": "per_class", "train": 15, "val": 10}
    graph = load_graph(GraphConfig.model_validate({"source": source, "split": split}), seed=0)
    bare, alone = assign == NO_LABELS, assign == NO_EDGES
    inside = ~(alone[graph.edge_index[0]] | alone[graph.edge_index[1]])
    masks = {name: getattr(graph, name) & ~bare for name in ("train_mask", "val_mask", "test_mask")}
    return replace(graph, edge_index=graph.edge_index[:, inside], y=graph.y.masked_fill(bare, -1), **masks), assign
