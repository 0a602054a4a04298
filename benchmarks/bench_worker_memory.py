"""What a training worker takes above idle, against the bytes of its largest unit, as the graph grows.

The real training (DeepSpeed in a world of one, label, kd and lsp losses, a validation pass) over parts that are read,
checked and decoded anew in every step: nothing is resident and the read-ahead is one unit, so what is measured
does not depend on how much memory there is. The graph is a row of communities of fixed size, cut into parts of
fixed size. Every case is a process of its own, which trains on a tiny graph of the same kind first; that is what
"idle" means.

The expected peak is the formula of docs/memory.md. Targets: at most 1.15 times that, and at most 10 % more from
the smallest to the largest graph.

    python benchmarks/bench_worker_memory.py           # features of 1 GB per part: half an hour, 20 GB of disk
    python benchmarks/bench_worker_memory.py --width 128 --part-nodes 50000 --nodes 100000 200000 --kinds gcn
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch
from bench_infer_memory import CLASSES, COMMUNITY, check_growth, make_graph, read_peak, reset_peak
from environment import describe, save

import gkd_dist.partition.build as build
from gkd_dist import layout
from gkd_dist.config import DistillConfig, KdLoss, LabelLoss, LspLoss, ModelConfig, PartitionConfig
from gkd_dist.distill.job import TrainJob, run_inline
from gkd_dist.distill.task import TrainTask, teacher_wants
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.quantise import pack_float
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage
from gkd_dist.stream.units import UnitLoader

TARGET = 1.15
LOSSES = (
    LabelLoss(kind="label"),
    KdLoss(kind="kd"),
    LspLoss(kind="lsp", outer_softmax=False, sigma=1.0, teacher_sigma=1.0),
)
TEACHER_LAYERS = 3


def prepare(num_nodes: int, part_nodes: int, root: Storage, args: argparse.Namespace) -> None:
    """Graph store and knowledge store; a tenth of the nodes has a label."""
    graph = make_graph(num_nodes, args.width, args.degree)
    labelled = torch.arange(num_nodes) % 10 == 0
    graph = replace(graph, train_mask=labelled, val_mask=labelled.roll(1), test_mask=labelled.roll(2))
    assign = torch.arange(num_nodes) // part_nodes
    build.assign_parts = lambda *ignored: assign
    config = PartitionConfig(method="metis", num_parts=-(-num_nodes // part_nodes))
    manifest = build.build_graph_store(
        graph, root.child("graph"), config, halo_hops=args.layers, seed=0, fingerprint="g" * 64
    )
    write_knowledge(root.child("knowledge"), manifest)


def write_knowledge(storage: Storage, graph: Manifest) -> None:
    """Random logits and scores in the form in which inference leaves them."""
    entries = []
    for index, part in enumerate(graph.parts):
        counts = part.counts
        values = {
            "logits": torch.randn(counts["num_owned"], int(graph.meta["num_classes"])),
            f"scores.{TEACHER_LAYERS - 1}.sqeuclidean": torch.rand(counts["num_owned_edges"]),
        }
        packed = {name: pack_float(value, "fp16") for name, value in values.items()}
        tensors = {name: tensor for name, (tensor, _) in packed.items()}
        floats = {name: {**info, "low": 0.0, "high": 1.0} for name, (_, info) in packed.items()}
        counts = {"num_owned": counts["num_owned"], "num_edges": counts["num_owned_edges"]}
        entries.append(write_shard(storage, layout.part(index), tensors, counts, {"floats": floats}))
    Manifest("knowledge", "k" * 64, {"graph": graph.fingerprint}, {}, tuple(entries)).save(storage)


def task_of(root: Storage, kind: str, args: argparse.Namespace, name: str) -> TrainTask:
    heads = 4 if kind == "gat" else 1
    options = {"kind": kind, "hidden": args.hidden // heads, "heads": heads, "layers": args.layers}
    knowledge = root.child("knowledge")
    return TrainTask(
        name,
        root.child(f"students/{name}"),
        GraphStore.open(root.child("graph")),
        (knowledge, Manifest.load(knowledge, "knowledge")),
        ModelConfig.model_validate(options),
        LOSSES,
        config_of(args),
        TEACHER_LAYERS,
        0,
        name,
    )


def config_of(args: argparse.Namespace) -> DistillConfig:
    return DistillConfig(
        launcher="inline",
        num_workers=1,
        epochs=args.epochs,
        units_per_step=1,
        threads=args.threads,
        prefetch_bytes=1,
        resident_bytes=0,
        checkpoint_every=1_000_000,
        compile=False,  # the compiler's own memory, once per process, is not what is asked for here
    )


def train(root: Storage, kind: str, args: argparse.Namespace, name: str) -> None:
    config = config_of(args)
    run_inline(TrainJob(root, (task_of(root, kind, args, name),), config), lambda task: lambda progress: None)


def expected(root: Storage, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """The formula of docs/memory.md for the largest unit, in bytes."""
    task = task_of(root, kind, args, "formula")
    graph = task.graph
    loader = UnitLoader(graph, task.knowledge, [(p,) for p in range(graph.num_parts)], teacher_wants(LOSSES, 3))
    unit = max(range(graph.num_parts), key=loader.size_of)
    counts, size, extra = graph.manifest.parts[unit].counts, loader.size_of(unit), loader.extra_of(unit)
    nodes, edges = counts["num_owned"] + counts["num_halo"], counts["num_edges"]
    per_value, per_edge = WORK[kind]
    work = per_value * nodes * args.hidden * (args.layers - 1) + 40 * counts["num_owned"] * CLASSES + per_edge * edges
    return {"unit": size, "extra": extra, "work": work, "expected": 2 * size + extra + work}


# bytes per hidden channel of a node, and per edge, from forward to backward: docs/memory.md
WORK = {"gcn": (34.0, 270.0), "sage": (34.0, 270.0), "gat": (34.0, 630.0)}


def measure(kind: str, root: Storage, args: argparse.Namespace) -> dict[str, float]:
    """Peak above idle of this process."""
    train(root.child("small"), kind, args, f"small-{kind}")
    idle = reset_peak()
    train(root.child("large"), kind, args, f"large-{kind}")
    return {"idle": idle, "peak": read_peak() - idle, **expected(root.child("large"), kind, args)}


def one(kind: str, num_nodes: int, folder: str, argv: list[str]) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, *argv, "--root", folder, "--kind", kind]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{kind} on {num_nodes:,} nodes failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found |= {"kind": kind, "nodes": num_nodes, "factor": found["peak"] / found["unit"]}
    found["of_expected"] = found["peak"] / found["expected"]
    mib = {name: f"{found[name] / 2**20:.0f}" for name in ("unit", "extra", "work", "idle", "peak", "expected")}
    verdict = "within" if found["of_expected"] <= TARGET else "ABOVE"
    print(
        f"{kind:5s} {num_nodes:>10,} nodes: unit {mib['unit']} MiB, extra {mib['extra']}, work {mib['work']}; "
        f"idle {mib['idle']}, peak above {mib['peak']} = {found['factor']:.2f} units, "
        f"{found['of_expected']:.2f} of {mib['expected']} ({verdict} {TARGET})",
        flush=True,
    )
    return found


def prepare_in_a_process(num_nodes: int, folder: str, args: argparse.Namespace) -> None:
    """`prepare`, whose memory is given back."""
    pid = os.fork()
    if pid == 0:
        root = Storage.open(folder)
        prepare(num_nodes, args.part_nodes, root.child("large"), args)
        prepare(2 * COMMUNITY, COMMUNITY, root.child("small"), args)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the stores could not be made")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000])
    parser.add_argument("--part-nodes", type=int, default=250_000, help="owned nodes of a part")
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--width", type=int, default=1_024, help="features per node")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of the student, and hops of halo")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=["gcn", "sage", "gat"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the result; default from the case")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.kind:
        print(json.dumps(measure(args.kind, Storage.open(args.root), args)))
        return
    rows = []
    for num_nodes in args.nodes:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            prepare_in_a_process(num_nodes, folder, args)
            rows += [one(kind, num_nodes, folder, argv) for kind in args.kinds]
    case = {key: value for key, value in vars(args).items() if key not in ("root", "kind", "name")}
    result = {"case": case, "rows": rows, "growth": check_growth(rows), "target": TARGET, "environment": describe()}
    save(args.name or f"worker-memory-d{args.width}-h{args.hidden}-l{args.layers}", result)


if __name__ == "__main__":
    main(sys.argv[1:])
