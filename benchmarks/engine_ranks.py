"""What `bench_engine.py` and `bench_zero.py` share: a student, its batches, and ranks as fresh processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gkd_dist.config import DistillConfig, KdLoss, LabelLoss, ModelConfig
from gkd_dist.distill.module import StudentModule, call_module
from gkd_dist.distill.optimizer import build_optimizer
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.losses.objective import Objective
from gkd_dist.models.build import build_model

ROOT = Path(__file__).resolve().parent.parent
FEATURES, CLASSES = 64, 10


def make_batch(rank: int, num_nodes: int, degree: int, first_id: int = 0) -> Batch:
    """A unit of ``num_nodes`` owned nodes without halo, other edges on every rank."""
    random = torch.Generator().manual_seed(rank)
    edges = torch.randint(num_nodes, (2, num_nodes * degree), generator=random)
    graph = LocalGraph.from_edge_index(edges, num_nodes)
    graph.num_owned = num_nodes
    graph.n_id = first_id + torch.arange(num_nodes)
    some = torch.rand(num_nodes, generator=random) < 0.5
    return Batch(
        rank,
        graph,
        torch.randn(num_nodes, FEATURES, generator=random),
        torch.randint(CLASSES, (num_nodes,), generator=random),
        some,
        ~some,
        ~some,
        graph.n_id,
        num_nodes,
        torch.randn(num_nodes, CLASSES, generator=random),
    )


def make_model(model: dict[str, Any]) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return build_model(ModelConfig.model_validate({"kind": "gcn", **model}), FEATURES, CLASSES)


def make_objective(layers: int) -> Objective:
    """Labels and soft labels."""
    return Objective((LabelLoss(kind="label"), KdLoss(kind="kd")), "multiclass", 2, layers, {})


def config_of(stage: int) -> DistillConfig:
    """AdamW with clipping, as in most configurations."""
    return DistillConfig(optimizer="adamw", lr=1e-3, grad_clip=1.0, zero_stage=stage)


class DdpEngine:
    """Bare `DistributedDataParallel` with the same optimizer and clipping, behind the methods that a step calls."""

    def __init__(self, model: nn.Module, config: DistillConfig) -> None:
        self.module = StudentModule(model)
        self._ddp = DistributedDataParallel(self.module)
        self._optimizer = build_optimizer(self.module.parameters(), config)
        self._clip = config.grad_clip or float("inf")

    def forward(self, batch: Batch, layers: Any) -> tuple[Tensor, dict[int, Tensor]]:
        return call_module(self._ddp, batch, layers, torch.float32)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with nullcontext() if last else self._ddp.no_sync():
            loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def train(self, mode: bool) -> None:
        self._ddp.train(mode)

    def close(self) -> None:
        """Nothing to release."""


def run_ranks(script: str, world_size: int, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs ``script`` once per rank with ``--rank REQUEST``; what each printed last, as JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, "--rank", json.dumps(request)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank failed: {[rank.returncode for rank in ranks]}")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]
