"""How much memory a process takes above idle: ``python memory_probe.py infer|stream|train|hoard STORE``, in bytes."""

from __future__ import annotations

import sys

import torch

from gkd_dist.config import InferConfig, LabelLoss, ModelConfig, TrainConfig
from gkd_dist.distill.job import train_inline
from gkd_dist.distill.task import TrainTask
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage
from gkd_dist.stream.order import Position
from gkd_dist.stream.prefetch import Prefetcher
from gkd_dist.stream.units import UnitLoader
from gkd_dist.telemetry import peak_rss_bytes


def infer(storage: Storage) -> None:
    """The whole inference in this process."""
    infer_nodes(
        storage.child("teacher"),
        GraphStore.open(storage.child("graph")),
        storage.child("knowledge"),
        Wants(True, {1: {"sqeuclidean"}}),
        InferConfig(num_actors=0),
        fingerprint="k" * 16,
    )


def stream(storage: Storage) -> None:
    """Every part once, read ahead by at most one part, nothing kept."""
    graph = GraphStore.open(storage.child("graph"))
    loader = UnitLoader(graph, None, [(part,) for part in range(graph.num_parts)])
    order = [(Position(0, part), part) for part in range(graph.num_parts)]
    with Prefetcher(loader.load, order, 1, 0, loader.size_of, num_threads=1) as batches:
        for _, batch in batches:
            batch.graph.gcn_matrix().matmul(batch.x)


def train(storage: Storage, resident_bytes: int = 0) -> None:
    """Two epochs of the real training, validation included: a unit in use, one read ahead, nothing kept."""
    label = (LabelLoss(kind="label"),)
    config = TrainConfig(
        epochs=2, units_per_step=1, prefetch_bytes=1, resident_bytes=resident_bytes, checkpoint_every=10_000
    )
    graph, model = GraphStore.open(storage.child("graph")), ModelConfig(kind="gcn", hidden=32)
    task = TrainTask("student", storage.child("student"), graph, None, model, label, config, 2, 0, "f" * 16)
    train_inline(storage, task, lambda progress: None)


def hoard(storage: Storage) -> None:
    """The same with room for every unit: what the measurement would see if memory followed the graph."""
    train(storage, resident_bytes=1 << 40)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.sparse.mm(torch.eye(4).to_sparse_csr(), torch.ones(4, 4))  # libraries load at the first product
    idle = peak_rss_bytes()
    {"infer": infer, "stream": stream, "train": train, "hoard": hoard}[sys.argv[1]](Storage.open(sys.argv[2]))
    print(peak_rss_bytes() - idle)
