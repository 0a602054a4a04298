"""Layer-wise inference by Ray actors over a stored graph, against the same modules on the whole graph in memory.

Three sides, timed in turns on one generated graph of communities that METIS cuts:

- ``coo``: PyG's convolutions on a COO ``edge_index``, one process, all threads;
- ``csr``: this package's convolutions on the whole graph as CSR, one process, all threads, the matrix built beforehand;
- ``actors``: `infer_nodes` with Ray actors of one thread each: parts and layer outputs read from and written to a
  file store, crc32 and sha256 of everything, the driver's records, manifest. Ray's start is measured apart.

    python benchmarks/bench_infer.py                                  # 500,000 nodes, 10 M edges: 10 to 20 minutes
    python benchmarks/bench_infer.py --nodes 50000 --repeats 1        # a look
    python benchmarks/bench_infer.py --device cuda --kinds gat        # no Ray: one worker in this process
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from environment import describe, save
from torch import Tensor, nn

from gkd_dist.config import InferConfig, ModelConfig, PartitionConfig, RayConfig
from gkd_dist.graph import Graph, LocalGraph
from gkd_dist.infer.plan import Task, Wants
from gkd_dist.infer.run import Executor, infer_nodes
from gkd_dist.infer.worker import Request, Result, Worker
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, read_model, save_model
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage

COMMUNITY = 2_000
SIDES = ("coo", "csr", "actors")


def make_graph(args: argparse.Namespace) -> Graph:
    """Undirected graph of communities of fixed size; the share ``args.outside`` of edges leaves its community."""
    random = torch.Generator().manual_seed(0)
    pairs = args.nodes * args.degree // 2
    source = torch.randint(args.nodes, (pairs,), generator=random)
    near = source // COMMUNITY * COMMUNITY + torch.randint(COMMUNITY, (pairs,), generator=random)
    far = torch.randint(args.nodes, (pairs,), generator=random)
    leaves = torch.rand(pairs, generator=random) < args.outside
    target = torch.where(leaves, far, near.clamp_max(args.nodes - 1))
    keep = source != target
    keys = torch.unique(torch.cat([source * args.nodes + target, target * args.nodes + source])[keep.repeat(2)])
    mask = torch.zeros(args.nodes, dtype=torch.bool)
    x = torch.randn(args.nodes, args.width, generator=random)
    edge_index = torch.stack([keys % args.nodes, keys // args.nodes])
    return Graph(x, edge_index, torch.zeros(args.nodes, dtype=torch.int64), mask, mask, mask, args.width)


def prepare(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Graph as tensors and as a store, one stored model per kind; what the cut is like."""
    graph = make_graph(args)
    torch.save({"x": graph.x, "edge_index": graph.edge_index}, root / "graph.pt")
    storage = Storage.open(str(root))
    partition = PartitionConfig(method="metis", num_parts=args.parts)
    manifest = build_graph_store(graph, storage.child("graph"), partition, halo_hops=1, seed=0, fingerprint="g" * 64)
    for kind in args.kinds:
        heads = 4 if kind == "gat" else 1
        options = {"kind": kind, "hidden": args.width // heads, "heads": heads, "layers": args.layers, "norm": "none"}
        spec = ModelSpec(ModelConfig.model_validate(options), args.width, args.width, "multiclass")
        torch.manual_seed(0)
        save_model(storage.child(kind), build_model(spec.config, args.width, args.width), spec, f"model-{kind}")
    keys = ("num_nodes", "num_edges", "num_parts", "cut_fraction", "halo_factor", "balance")
    return {key: manifest.meta[key] for key in keys}


# --- in memory -------------------------------------------------------------------------------------------


def pyg_forward(model: Any, x: Tensor, edge_index: Tensor) -> Tensor:
    """The stack of the model's own PyG convolutions, with PyG's own ``forward``."""
    for number, conv in enumerate(model.convs, start=1):
        x = type(conv).__mro__[1].forward(conv, x, edge_index)
        x = x if number == model.num_layers else model.activate(number, x)
    return x


def in_memory(side: str, kind: str, root: Path, args: argparse.Namespace) -> float:
    """Seconds of one forward over the whole graph; writes the logits."""
    torch.set_num_threads(args.threads)
    data = torch.load(root / "graph.pt", weights_only=True)
    model: nn.Module = read_model(Storage.open(str(root)).child(kind))[0].to(args.device)
    x, edge_index = data["x"].to(args.device), data["edge_index"].to(args.device)
    graph = LocalGraph.from_edge_index(edge_index, x.size(0)) if side == "csr" else None
    with torch.inference_mode():
        if graph is not None:
            model(x[:, :], graph)  # the matrix and its normalisation are built once, as in any in-memory form
        best = float("inf")
        for _ in range(2):  # the first one touches fresh memory
            synchronise(args.device)
            start = time.perf_counter()
            out = model(x, graph) if graph is not None else pyg_forward(model, x, edge_index)
            synchronise(args.device)
            best = min(best, time.perf_counter() - start)
    torch.save(out.cpu(), root / f"{side}-{kind}.pt")
    return best


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# --- actors ------------------------------------------------------------------------------------------------


def with_actors(kind: str, root: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one inference and of Ray's start; on CUDA one worker in this process, without Ray."""
    settings = InferConfig(num_actors=args.actors, threads=args.threads // max(1, args.actors), dtype="fp16")
    if args.device != "cpu":
        return on_gpu(kind, root, settings, args)
    from gkd_dist.infer.actor import ActorPool
    from gkd_dist.infer.cluster import start_ray

    start = time.perf_counter()
    with start_ray(RayConfig(), args.actors, 0), ActorPool(settings) as pool:
        pool.pids()
        seconds = {"ray_start_s": time.perf_counter() - start}
        run_inference(kind, root, settings, "warm", pool, args)  # as the in-memory sides have had one
        return seconds | {"infer_s": run_inference(kind, root, settings, "timed", pool, args)}


class Threads:
    """What an actor does, in this process: tasks in flight in threads of one worker; counts the device's time."""

    def __init__(self, window: int) -> None:
        self.num_slots, self.compute_s = window, 0.0
        self._worker, self._threads = Worker(), ThreadPoolExecutor(window)
        self._flights: dict[Future[Result], Task] = {}

    def submit(self, request: Request) -> None:
        self._flights[self._threads.submit(self._worker.run, request)] = request.task

    def wait(self) -> list[tuple[Task, Result]]:
        done, _ = wait(self._flights, return_when=FIRST_COMPLETED)
        results = [(self._flights.pop(flight), flight.result()) for flight in done]
        self.compute_s += sum(result.seconds["compute"] for _, result in results)
        return results

    def discard(self) -> None:
        self._flights.clear()


def on_gpu(kind: str, root: Path, settings: InferConfig, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one inference, how much of it the device computed, and the bytes of gathered rows per second."""
    settings = settings.model_copy(update={"num_actors": 0, "gpus_per_actor": 1, "window": args.window})
    pool = Threads(args.window)
    run_inference(kind, root, settings, "warm", pool, args)
    pool.compute_s = 0.0
    seconds = run_inference(kind, root, settings, "timed", pool, args)
    num_edges = json.loads((root / "cut.json").read_text())["num_edges"]
    gathered = args.layers * num_edges * args.width * 4
    return {
        "ray_start_s": 0.0,
        "infer_s": seconds,
        "busy": pool.compute_s / seconds,
        "gathered_bytes_per_s": gathered / pool.compute_s,
    }


def run_inference(
    kind: str, root: Path, settings: InferConfig, name: str, pool: Executor, args: argparse.Namespace
) -> float:
    storage = Storage.open(str(root))
    out = storage.child(f"knowledge-{kind}-{name}")
    out.delete_tree("")
    start = time.perf_counter()
    wants = Wants(True, {args.layers - 1: {"sqeuclidean"}} if args.scores else {})
    infer_nodes(
        storage.child(kind), GraphStore.open(storage.child("graph")), out, wants, settings,
        fingerprint="k" * 64, pool=pool,
    )  # fmt: skip
    return time.perf_counter() - start


def check(kind: str, root: Path) -> float:
    """Largest difference of the stored logits from the in-memory ones, relative to the largest logit."""
    from gkd_dist.shards.manifest import Manifest
    from gkd_dist.shards.quantise import unpack_float
    from gkd_dist.shards.reader import read_shard

    storage = Storage.open(str(root))
    graph, out = GraphStore.open(storage.child("graph")), storage.child(f"knowledge-{kind}-timed")
    expected = torch.load(root / f"csr-{kind}.pt", weights_only=True)
    worst = 0.0
    for part, entry in enumerate(Manifest.load(out, "knowledge").parts):
        values = unpack_float(read_shard(out, entry, ["logits"])["logits"], entry.meta["floats"]["logits"])
        n_id = graph.part(part, ["n_id"])["n_id"][: values.size(0)]
        worst = max(worst, float((values - expected[n_id]).abs().max()))
    return worst / float(expected.abs().max())


# --- the run --------------------------------------------------------------------------------------------------


def one(side: str, kind: str, root: Path, argv: list[str]) -> dict[str, float]:
    """One timing in a process of its own."""
    command = [sys.executable, __file__, *argv, "--root", str(root), "--side", side, "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {kind} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=500_000)
    parser.add_argument("--degree", type=int, default=20)
    parser.add_argument("--outside", type=float, default=0.05, help="share of edges that leave their community")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", default=["gcn", "sage", "gat"])
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the in-memory sides, and of all actors together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, default=3, help="tasks in flight on a GPU")
    parser.add_argument("--scores", action="store_true", help="also the scores of the last hidden layer")
    parser.add_argument("--name", help="of the result; default from the size")
    parser.add_argument("--root", type=Path, help="keep the prepared graph here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.side:
        timing = with_actors(args.kind, args.root, args) if args.side == "actors" else {
            "infer_s": in_memory(args.side, args.kind, args.root, args)
        }  # fmt: skip
        print(json.dumps(timing))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        root = args.root or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        kept = root / "cut.json"
        cut = json.loads(kept.read_text()) if kept.exists() else prepare(args, root)
        kept.write_text(json.dumps(cut))
        print(json.dumps(cut))
        rows = [row(kind, root, argv, args) for kind in args.kinds]
    case = {key: getattr(args, key) for key in ("width", "layers", "actors", "threads", "repeats", "device", "scores")}
    name = args.name or f"infer-{args.device}-n{args.nodes}-k{args.degree}"
    save(name, {"case": case | cut | {"outside": args.outside}, "rows": rows, "environment": describe()})


def row(kind: str, root: Path, argv: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """All sides of one kind of model, in turns."""
    timings: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side in SIDES:
            timings[side].append(one(side, kind, root, argv))
    middle = {side: statistics.median(t["infer_s"] for t in timings[side]) for side in SIDES}
    found: dict[str, Any] = {
        "kind": kind,
        "seconds": {side: [t["infer_s"] for t in timings[side]] for side in SIDES},
        "nodes_per_s": {side: args.nodes / middle[side] for side in SIDES},
        "ray_start_s": statistics.median(t["ray_start_s"] for t in timings["actors"]),
        "actors_over_coo": middle["coo"] / middle["actors"],
        "actors_over_csr": middle["csr"] / middle["actors"],
        "relative_difference": check(kind, root),
        **{key: value for key, value in timings["actors"][-1].items() if key not in ("ray_start_s", "infer_s")},
    }
    text = "  ".join(f"{side} {middle[side]:7.2f} s {found['nodes_per_s'][side]:10,.0f} nodes/s" for side in SIDES)
    print(f"{kind:5s} {text}  actors/coo {found['actors_over_coo']:.2f}  actors/csr {found['actors_over_csr']:.2f}  "
          f"(Ray's start {found['ray_start_s']:.1f} s)", flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
