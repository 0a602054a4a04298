"""How long training waits for data: a real distillation on two workers, on files and on S3 that is 20 ms away.

Two processes train a student with DeepSpeed over gloo (label, kd and lsp losses) on a graph in communities. No unit
stays in memory, so every step streams: parts are read, checked, decoded and, on S3, downloaded while the step before
computes. Reported is the share of step time that a worker was blocked, the mean of both, without each worker's first
step, for which nothing could be read ahead; the whole run with its start and its validation passes stands beside it.

- ``file``: a folder
- ``s3``: an S3 server whose every answer takes 20 ms more, read anew in each epoch
- ``s3-cache``: the same through the cache of the machine, empty at the start

The server is `object_server.py`, on the same cores as the workers; ``--server moto`` takes moto behind the proxy of
the tests instead, which need far more of them.

    python benchmarks/bench_stream.py                                        # 200,000 nodes, 4 million edges, 5 epochs
    python benchmarks/bench_stream.py --nodes 20000 --epochs 2 --where file  # a minute
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_infer_memory import make_graph
from bench_object_store import BUCKET, serving
from bench_worker_memory import LOSSES, TEACHER_LAYERS, write_knowledge
from environment import describe, save

from gkd_dist.config import CacheConfig, DistillConfig, ModelConfig, PartitionConfig, StorageConfig
from gkd_dist.distill.engine import DeepSpeedEngine
from gkd_dist.distill.task import TrainTask
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.world import World

TARGETS = {"file": 0.05, "s3": 0.10, "s3-cache": 0.10}
TESTS = Path(__file__).parents[1] / "tests"


class Steps:
    """A watcher that keeps what every step took."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # seconds, of which waiting

    def step(self, step: int, report: Any, names: list[str], extra: dict[str, float]) -> None:
        self.steps.append((extra["time/step_s"], extra["stream/wait_s"]))

    def evaluation(self, *values: Any) -> None:
        pass


def prepare(root: Storage, args: argparse.Namespace) -> None:
    """Graph and knowledge of communities, a tenth of the nodes labelled."""
    import torch

    import gkd_dist.partition.build as build

    graph = make_graph(args.nodes, args.width, args.degree)
    labelled = torch.arange(args.nodes) % 10 == 0
    graph = replace(graph, train_mask=labelled, val_mask=labelled.roll(1), test_mask=labelled.roll(2))
    build.assign_parts = lambda *ignored: torch.arange(args.nodes) * args.parts // args.nodes
    config = PartitionConfig(method="metis", num_parts=args.parts)
    manifest = build.build_graph_store(
        graph, root.child("graph"), config, halo_hops=args.layers, seed=0, fingerprint="g" * 64
    )
    write_knowledge(root.child("knowledge"), manifest)


def task_of(url: str, out: str, cache: str | None, args: argparse.Namespace) -> TrainTask:
    # one attempt more than the first: a benchmark that has to try again should say so by being slow
    root = Storage.open(url, StorageConfig(retries=1))
    knowledge = root.child("knowledge")
    config = DistillConfig(
        launcher="torchrun",
        num_workers=args.workers,
        epochs=args.epochs,
        units_per_step=args.workers,
        threads=1,
        resident_bytes=0,
        patience=0,
        checkpoint_every=1_000_000,
        cache=CacheConfig(folder=cache),
    )
    return TrainTask(
        "student",
        Storage.open(out),
        GraphStore.open(root.child("graph")),
        (knowledge, Manifest.load(knowledge, "knowledge")),
        ModelConfig.model_validate({"kind": args.kind, "hidden": args.hidden, "layers": args.layers}),
        LOSSES,
        config,
        TEACHER_LAYERS,
        0,
        "f" * 64,
    )


def work(url: str, out: str, cache: str | None, args: argparse.Namespace) -> None:
    """One rank; prints what its steps took."""
    world = World.from_env()
    world.connect(600)
    prepare_process(1)
    task = task_of(url, out, cache, args)
    trainer = Trainer(task, world, lambda model, steps: DeepSpeedEngine(model, task.train, world, steps))
    trainer.watcher = watcher = Steps()  # on every rank
    summary = trainer.run()
    world.barrier()
    world.disconnect()
    print(json.dumps({"steps": watcher.steps, "wall_s": summary.wall_s, "wait_s": summary.wait_s}))


def run_group(url: str, out: str, cache: str | None, argv: list[str], workers: int) -> list[dict[str, Any]]:
    """All ranks of a training on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, *argv, "--work", json.dumps([url, out, cache])]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(workers)
    ]  # fmt: skip
    found = []
    for rank, process in enumerate(ranks):
        stdout, stderr = process.communicate()
        if process.returncode:
            for other in ranks:
                other.kill()
            raise SystemExit(f"rank {rank} failed:\n{stderr[-3000:]}")
        found.append(json.loads(stdout.splitlines()[-1]))
    return found


@contextlib.contextmanager
def s3(args: argparse.Namespace) -> Iterator[None]:
    """A server that is far away; the environment points to it."""
    if args.server == "moto":
        sys.path.insert(0, str(TESTS))
        from fault_proxy import fault_proxy

        with serving("moto") as endpoint, fault_proxy(endpoint) as proxy:
            bucket = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
            urllib.request.urlopen(bucket).close()
            proxy.delay_s = args.latency_s
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            yield
        return
    with serving("fast", str(args.latency_s)):
        yield


def measure(where: str, url: str, folder: Path, argv: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Shares of waiting of one training."""
    cache = str(folder / "cache") if where == "s3-cache" else None
    ranks = run_group(url, str(folder / f"out-{where}"), cache, argv, args.workers)
    shares = [sum(w for _, w in rank["steps"][1:]) / sum(s for s, _ in rank["steps"][1:]) for rank in ranks]
    found = {
        "where": where,
        "share": sum(shares) / len(shares),
        "step_s": sum(s for s, _ in ranks[0]["steps"][1:]) / (len(ranks[0]["steps"]) - 1),
        "steps": len(ranks[0]["steps"]),
        "wall_s": ranks[0]["wall_s"],
        "wait_s": ranks[0]["wait_s"],
        "target": TARGETS[where],
        "ranks": ranks,
    }
    verdict = "within" if found["share"] < found["target"] else "ABOVE"
    print(
        f"{where:9s} {found['steps']} steps of {found['step_s']:.2f} s: waited {found['share']:.1%} of them "
        f"({verdict} {found['target']:.0%}); the whole run {found['wall_s']:.1f} s, of which {found['wait_s']:.1f} s",
        flush=True,
    )
    return found


def upload(local: Storage, remote: Storage) -> None:
    for key in local.list():
        remote.write(key, local.read(key))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--degree", type=int, default=20)
    parser.add_argument("--width", type=int, default=128, help="features per node")
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--kind", default="gcn")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--where", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--server", choices=["fast", "moto"], default="fast")
    parser.add_argument("--latency-s", type=float, default=0.02)
    parser.add_argument("--name", default="stream-wait", help="of the JSON file under benchmarks/results")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.work:
        work(*json.loads(args.work), args)
        return
    with tempfile.TemporaryDirectory(prefix="gkd-stream-") as name:
        folder = Path(name)
        local = Storage.open(str(folder / "store"))
        prepare(local, args)
        rows = [measure("file", local.url, folder, argv, args)] if "file" in args.where else []
        if remote := [where for where in args.where if where != "file"]:
            with s3(args):
                upload(local, Storage.open(f"s3://{BUCKET}/store"))
                rows += [measure(where, f"s3://{BUCKET}/store", folder, argv, args) for where in remote]
    case = {key: value for key, value in vars(args).items() if key not in ("name", "work")}
    save(args.name, {"case": case, "rows": rows, "environment": describe()})


if __name__ == "__main__":
    main(sys.argv[1:])
