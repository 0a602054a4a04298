"""Stored hops against exchange: time of a step over the whole graph, memory of a worker, and what is computed twice.

Both train the same student on the same cut with the same ranks (gloo, DeepSpeed stage 1), exactly: with as many
stored hops as the student is deep, or with one and an exchange per layer. One process per rank and setting.

    python benchmarks/bench_exchange.py                                         # 100,000 nodes, 2 ranks, 2 to 6 layers
    python benchmarks/bench_exchange.py --nodes 4000 --layers 2 3 --steps 3      # a minute's look
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import describe

from gkd_dist.config import DistillConfig, GraphConfig, LabelLoss, ModelConfig, PartitionConfig
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage

WAYS = {
    "hops": {"halo": "hops", "units_per_step": "all"},
    "exchange": {"halo": "exchange"},
    "exchange, layers computed again": {"halo": "exchange", "checkpoint_layers": True},
}


def build(args: argparse.Namespace, root: Path, hops: int) -> Storage:
    """The graph of communities, cut by METIS, with ``hops`` of halo."""
    from gkd_dist.data.sources import load_graph
    from gkd_dist.partition.build import build_graph_store

    source = {
        "kind": "synthetic",
        "num_nodes": args.nodes,
        "average_degree": args.degree,
        "num_features": args.features,
        "num_classes": args.communities,
        "homophily": 0.9,
        "partner": 0.05,
    }
    graph = load_graph(GraphConfig.model_validate({"source": source}), seed=0)
    storage = Storage.open(str(root / f"hops-{hops}"))
    config = PartitionConfig(num_parts=args.parts)
    build_graph_store(graph, storage.child("graph"), config, halo_hops=hops, seed=0, fingerprint="g")
    return storage


def train(store: str, way: str, args: argparse.Namespace, out: str) -> None:
    """One rank; rank 0 writes the times of its steps, and every rank its peak."""
    from gkd_dist.distill.engine import DeepSpeedEngine
    from gkd_dist.distill.task import TrainTask
    from gkd_dist.distill.trainer import Trainer, prepare_process
    from gkd_dist.telemetry import peak_rss_bytes
    from gkd_dist.world import World

    world, storage = World.from_env(), Storage.open(store)
    world.connect(300)
    prepare_process(1)
    idle = peak_rss_bytes()
    config = DistillConfig.model_validate(
        {"epochs": args.steps + 1, "eval_every": args.steps + 1, "patience": 0, "checkpoint_every": 10**6, **WAYS[way]}
    )
    model = ModelConfig(kind=args.kind, hidden=args.hidden, layers=args.depth, dropout=0.3)
    graph, losses = GraphStore.open(storage.child("graph")), (LabelLoss(kind="label"),)
    output = storage.child(f"students/{way.replace(' ', '-')}-{args.depth}")
    task = TrainTask("bench", output, graph, None, model, losses, config, 1, 0, out)
    times: list[float] = []

    class Clock:
        def step(self, step: int, report: Any, names: list[str], extra: dict[str, float]) -> None:
            times.append(extra["time/step_s"])

        def evaluation(self, *seen: Any) -> None:
            pass

    trainer = Trainer(task, world, lambda m, steps: DeepSpeedEngine(m, config, world, steps), Clock())
    exchanged = 0 if trainer.share is None else sum(trainer.share.batch().graph.halo.plan.send_counts)  # type: ignore[union-attr]
    trainer.run()
    peak = peak_rss_bytes()
    found = {"step_s": times[1:], "idle_bytes": idle, "peak_bytes": peak, "rows_sent": exchanged}
    Path(f"{out}.{world.rank}").write_text(json.dumps(found))
    world.barrier()
    os._exit(0)


def run(store: Storage, way: str, depth: int, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All ranks of one setting, in fresh processes."""
    out = str(root / f"result-{way.replace(' ', '-')}-{depth}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    options = [f"--{key}={value}" for key, value in vars(args).items() if key in KEPT]
    command = [sys.executable, __file__, *options, "--depth", str(depth), "--worker", store.url, way, out]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(args.ranks)]
    failed = [rank.wait(timeout=3600) for rank in ranks]
    if any(failed):
        raise SystemExit(f"{way} with {depth} layers failed: exit codes {failed}")
    found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(args.ranks)]
    return {
        "step_s": statistics.median(found[0]["step_s"]),
        "worker_bytes": max(one["peak_bytes"] - one["idle_bytes"] for one in found),
        "rows_sent": sum(one["rows_sent"] for one in found),
    }


def describe_result(found: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{found['layers']} layers, {found['way']:31s}: step {found['step_s']:.3f} s, "
        f"worker {found['worker_bytes'] / 2**20:.0f} MiB, copies per node {found['halo_nodes_per_node']:.2f}, "
        f"rows sent per layer {found['rows_sent']:,}"
    )


KEPT = ("kind", "hidden", "steps", "nodes", "degree", "features", "communities", "parts", "ranks")


def main() -> None:
    """Prints a line per depth and way, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--communities", type=int, default=50)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kind", default="gcn")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--depth", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        store, way, out = args.worker
        train(store, way, args, out)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores = {hops: build(args, root, hops) for hops in {1, *args.layers}}
        results = []
        for depth in args.layers:
            parts = GraphStore.open(stores[depth].child("graph")).manifest.parts
            copies = sum(part.counts["num_halo"] for part in parts) / args.nodes
            for way in WAYS:
                found = run(stores[depth if way == "hops" else 1], way, depth, args, root)
                results.append(
                    {"layers": depth, "way": way, "halo_nodes_per_node": copies if way == "hops" else 0.0, **found}
                )
                print(describe_result(results[-1]), flush=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "worker", "depth")}
    if args.out is not None:
        document = {"benchmark": "exchange", "settings": settings, "results": results, **describe()}
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
