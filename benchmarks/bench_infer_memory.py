"""Memory of an inference worker against the part that it works on: contract C6 for actors.

Every case runs in a process of its own: an inference over a graph of communities of fixed size, cut into parts of
equal size, whose number grows with the graph. ``peak`` is the largest resident memory of the worker above what it had
when its libraries and its model were loaded, ``part`` the bytes of the features of the largest part with its halo.

``--where threads`` (default) runs a worker with ``--window`` tasks in flight in threads, as an actor has them, and
``--where actor`` one Ray actor. Nothing the size of the graph is made: features are windows over one row of numbers.

    python benchmarks/bench_infer_memory.py --kinds gcn sage gat --nodes 500000 1000000 2000000
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_infer import Threads
from environment import describe, save

import gkd_dist.partition.build as build
from gkd_dist.config import InferConfig, ModelConfig, PartitionConfig, RayConfig
from gkd_dist.graph import Graph
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import Executor, infer_nodes
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage
from gkd_dist.telemetry import peak_rss_bytes

COMMUNITY = 2_000
GROWTH = 0.10
CLASSES = 64


def make_graph(num_nodes: int, width: int, degree: int) -> Graph:
    """Communities in a row: an edge in ten leads to the next or the previous one, all others stay inside."""
    random = torch.Generator().manual_seed(0)
    nodes = torch.arange(num_nodes)
    source = nodes.repeat(degree // 2)
    step = torch.where(torch.rand(source.numel(), generator=random) < 0.1, COMMUNITY, 0)
    target = source // COMMUNITY * COMMUNITY + step + torch.randint(COMMUNITY, source.shape, generator=random)
    keep = (target < num_nodes) & (source != target)
    keys = torch.unique(torch.cat([source * num_nodes + target, target * num_nodes + source])[keep.repeat(2)])
    x = torch.randn(num_nodes + width, generator=random).unfold(0, width, 1)[:num_nodes]
    mask = torch.zeros(num_nodes, dtype=torch.bool)
    edge_index = torch.stack([keys % num_nodes, keys // num_nodes])
    return Graph(x, edge_index, torch.zeros(num_nodes, dtype=torch.int64), mask, mask, mask, CLASSES)


def prepare(num_nodes: int, root: Path, args: argparse.Namespace) -> None:
    """The store of a graph, whose parts are ranges of communities, and one model per kind."""
    storage = Storage.open(str(root))
    graph = make_graph(num_nodes, args.width, args.degree)
    num_parts = -(-num_nodes // args.part_nodes)
    assign = torch.arange(num_nodes) // args.part_nodes
    build.assign_parts = lambda *ignored: assign
    config = PartitionConfig(method="metis", num_parts=num_parts)
    build.build_graph_store(graph, storage.child("graph"), config, halo_hops=1, seed=0, fingerprint="g" * 64)
    for kind in args.kinds:
        heads = 4 if kind == "gat" else 1
        options = {"kind": kind, "hidden": args.hidden // heads, "heads": heads, "layers": args.layers, "norm": "none"}
        spec = ModelSpec(ModelConfig.model_validate(options), args.width, CLASSES, "multiclass")
        torch.manual_seed(0)
        save_model(storage.child(kind), build_model(spec.config, args.width, CLASSES), spec, f"model-{kind}")


def reset_peak(pid: int | str = "self") -> int:
    """Forgets the peak of a process; returns its resident memory, in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return read_peak(pid)


def read_peak(pid: int | str = "self") -> int:
    if pid == "self":
        return peak_rss_bytes()
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def infer(kind: str, root: Path, args: argparse.Namespace, pool: Executor, parts: str) -> None:
    storage = Storage.open(str(root))
    settings = InferConfig(num_actors=1, threads=args.threads, tile_edges=args.tile_edges, window=args.window)
    wants = Wants(True, {args.layers - 1: {"sqeuclidean"}})
    out = storage.child(f"knowledge-{kind}")
    out.delete_tree("")
    graph = GraphStore.open(storage.child(parts))
    infer_nodes(storage.child(kind), graph, out, wants, settings, fingerprint="k" * 64, pool=pool)
    out.delete_tree("")


def measure(kind: str, root: Path, args: argparse.Namespace) -> dict[str, int]:
    """Peak above idle of the worker, after a small run that has brought in everything that stays."""
    if args.where == "threads":
        pool = Threads(args.window)
        infer(kind, root, args, pool, "small")
        idle = reset_peak()
        infer(kind, root, args, pool, "graph")
        return {"idle": idle, "peak": read_peak() - idle}
    from gkd_dist.infer.actor import ActorPool
    from gkd_dist.infer.cluster import start_ray

    settings = InferConfig(num_actors=1, threads=args.threads, window=args.window)
    with start_ray(RayConfig(), 1, 0), ActorPool(settings) as actors:
        (pid,) = actors.pids()
        infer(kind, root, args, actors, "small")
        idle = reset_peak(pid)
        infer(kind, root, args, actors, "graph")
        return {"idle": idle, "peak": read_peak(pid) - idle}


def one(kind: str, num_nodes: int, root: Path, argv: list[str]) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, *argv, "--root", str(root), "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} on {num_nodes:,} nodes failed:\n{done.stderr}")
    graph = GraphStore.open(Storage.open(str(root)).child("graph"))
    counts = [entry.counts for entry in graph.manifest.parts]
    largest = max(c["num_owned"] + c["num_halo_1"] for c in counts)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    part = largest * graph.num_features * 4
    found |= {"kind": kind, "nodes": num_nodes, "parts": len(counts), "part": part, "factor": found["peak"] / part}
    found |= {"part_nodes": largest, "part_edges": max(c["num_owned_edges"] for c in counts)}
    idle, peak = found["idle"] / 2**20, found["peak"] / 2**20
    print(
        f"{kind:5s} {num_nodes:>10,} nodes {len(counts):3d} parts: part {part / 2**20:6.0f} MiB  "
        f"idle {idle:5.0f} MiB  peak above {peak:6.0f} MiB  factor {found['factor']:.2f}",
        flush=True,
    )
    return found


def check_growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Largest change of the peak of each kind over all sizes, as a share of the smallest."""
    growth = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        peaks = [row["peak"] for row in rows if row["kind"] == kind]
        growth[kind] = max(peaks) / min(peaks) - 1
        print(f"{kind:5s} growth {100 * growth[kind]:.1f} % ({'within' if growth[kind] <= GROWTH else 'ABOVE'} 10 %)")
    return growth


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000])
    parser.add_argument("--part-nodes", type=int, default=250_000, help="owned nodes of a part")
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--width", type=int, default=1_024, help="features per node")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tile-edges", type=int, default=InferConfig().tile_edges)
    parser.add_argument("--kinds", nargs="+", default=["gcn", "sage", "gat"])
    parser.add_argument("--where", choices=["threads", "actor"], default="threads")
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the result; default from the case")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.kind:
        print(json.dumps(measure(args.kind, args.root, args)))
        return
    rows = []
    for num_nodes in args.nodes:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            root = Path(folder)
            prepare_in_a_process(num_nodes, root, args)
            rows += [one(kind, num_nodes, root, argv) for kind in args.kinds]
    case = {k: v for k, v in vars(args).items() if k not in ("root", "kind", "name")}
    result = {"case": case, "rows": rows, "growth": check_growth(rows), "environment": describe()}
    save(args.name or f"infer-memory-{args.where}-d{args.width}-w{args.window}", result)


def prepare_in_a_process(num_nodes: int, root: Path, args: argparse.Namespace) -> None:
    """`prepare`, whose memory is given back."""
    pid = os.fork()
    if pid == 0:
        prepare(num_nodes, root, args)
        small = argparse.Namespace(**{**vars(args), "part_nodes": COMMUNITY})
        os.rename(root / "graph", root / "large")
        prepare(2 * COMMUNITY, root, small)
        os.rename(root / "graph", root / "small")
        os.rename(root / "large", root / "graph")
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the graph store could not be made")


if __name__ == "__main__":
    main(sys.argv[1:])
