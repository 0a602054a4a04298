"""The driver of an inference over very many parts: its memory and its own time. Contract C6 for the driver.

The graph store is real (communities of ``--community`` nodes in a ring, one per part, each bordering on its
neighbours); tasks are not computed: an executor answers at once with entries as a worker would return them. Records,
schedule, manifest and score histograms are the real ones. Memory counts above the process with its libraries loaded.

    python benchmarks/bench_infer_driver.py                  # 10,000 parts
    python benchmarks/bench_infer_driver.py --parts 500
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
from environment import describe, save

import gkd_dist.partition.build as build
from gkd_dist import layout
from gkd_dist.config import InferConfig, ModelConfig, PartitionConfig
from gkd_dist.graph import Graph
from gkd_dist.infer.plan import KNOWLEDGE, Task, Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.infer.worker import Request, Result
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.entries import ObjectEntry, TensorEntry
from gkd_dist.storage import Storage
from gkd_dist.telemetry import peak_rss_bytes

WANTS = Wants(True, {2: {"sqeuclidean"}})
CLASSES = 3


class Answering:
    """An executor whose tasks are done as soon as they are handed out."""

    num_slots = 64

    def __init__(self) -> None:
        self._done: deque[tuple[Task, Result]] = deque()

    def submit(self, request: Request) -> None:
        task, job = request.task, request.job
        names = ["owned", "to-00000", "to-00001"] if task.layer != KNOWLEDGE else ["logits", "scores.2.sqeuclidean"]
        tensors = tuple(TensorEntry(name, "float16", (64, 128), 8, 8 + 64 * 128 * 2, 1) for name in names)
        digest = hashlib.sha256(str(task).encode()).hexdigest()
        folder = "" if task.layer == KNOWLEDGE else f"layer-{task.layer}/"
        key = f"{folder}{layout.part(task.part)}-{digest[:8]}.safetensors"
        if task.layer != KNOWLEDGE:
            self._done.append((task, Result(ObjectEntry(key, 20_000, 1, digest, tensors))))
            return
        counts = {"num_owned": 64, "num_halo_1": 64, "num_owned_edges": 640}
        score = {"scale": 1.0, "bound": 0.01, "low": 0.0, "high": 9.0}
        meta = {"floats": {"logits": {"scale": 1.0, "bound": 0.01}, "scores.2.sqeuclidean": score}}
        histogram = {16_000 + (task.part * 31 + k * 7) % 600: 1 + k % 5 for k in range(200)}
        assert job.packing.dtype == "fp16"
        entry = ObjectEntry(key, 20_000, 1, digest, tensors, counts, meta)
        self._done.append((task, Result(entry, {"scores.2.sqeuclidean": histogram})))

    def wait(self) -> list[tuple[Task, Result]]:
        found = list(self._done)
        self._done.clear()
        return found

    def discard(self) -> None:
        self._done.clear()


def make_store(root: Storage, num_parts: int, community: int) -> None:
    """Each node is joined to the next three of its community, and one of each community to the next community."""
    nodes = torch.arange(num_parts * community)
    first = nodes // community * community
    edges = [torch.stack([first + (nodes - first + k) % community, nodes]) for k in (1, 2, 3)]
    gates = torch.arange(0, nodes.numel(), community)
    edges += [torch.stack([gates, gates.roll(1)]), torch.stack([gates, gates.roll(-1)])]
    mask = torch.zeros(nodes.numel(), dtype=torch.bool)
    graph = Graph(torch.rand(nodes.numel(), 4), torch.cat(edges, 1), nodes % CLASSES, ~mask, mask, mask, CLASSES)
    build.assign_parts = lambda *_: nodes // community  # communities are parts: METIS would take its time to find out
    config = PartitionConfig(method="metis", num_parts=num_parts)
    build.build_graph_store(graph, root.child("graph"), config, halo_hops=1, seed=0, fingerprint="g" * 64)
    spec = ModelSpec(ModelConfig(kind="sage", hidden=8, layers=3), 4, CLASSES, "multiclass")
    save_model(root.child("teacher"), build_model(spec.config, 4, CLASSES), spec, "t")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--community", type=int, default=8)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.root is None:
        with tempfile.TemporaryDirectory() as folder:
            make_store(Storage.open(folder), args.parts, args.community)
            import subprocess

            subprocess.run([sys.executable, *sys.argv, "--root", folder], check=True)
        return
    root = Storage.open(str(args.root))
    build_model(ModelConfig(kind="sage", hidden=8), 4, CLASSES)  # libraries load
    torch.sparse.mm(torch.eye(4).to_sparse_csr(), torch.ones(4, 4))
    idle, started = peak_rss_bytes(), time.perf_counter()
    graph = GraphStore.open(root.child("graph"))
    opened = peak_rss_bytes()
    manifest = infer_nodes(
        root.child("teacher"), graph, root.child("knowledge"), WANTS, InferConfig(num_actors=0),
        fingerprint="k" * 64, pool=Answering(),
    )  # fmt: skip
    seconds, peak = time.perf_counter() - started, peak_rss_bytes()
    result = {
        "parts": args.parts,
        "tasks": 3 * args.parts,
        "seconds": seconds,
        "above_idle_bytes": peak - idle,
        "graph_store_bytes": opened - idle,
        "target_bytes": 500_000_000,
    }
    assert len(manifest.parts) == args.parts
    print(result)
    save(f"infer-driver-p{args.parts}", {**result, "environment": describe()})


if __name__ == "__main__":
    main()
