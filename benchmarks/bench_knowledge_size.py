"""Bytes and seconds of teacher knowledge for LSP: scores of edges against embeddings of nodes.

A graph on a ring (each node is joined to others within reach, ids are shuffled) is cut by METIS; the reach is such
that the halo of all parts together is about as large as the graph. One layer of random embeddings is then stored in
every form by the writer and read by the reader that a run uses, digests on: embeddings of owned and first-hop halo
nodes, and squared distances of the in-edges. All forms of all parts are timed in turns, each ``--repeats`` times;
the best is kept. ``write_s`` is from float32 tensors to stored objects; ``read_s`` from stored objects to float32
scores, which for embeddings includes computing them: that is what every epoch pays. ``score_s`` is computing them
once, before storing.

    python benchmarks/bench_knowledge_size.py                               # 200,000 nodes, degree 14, 256 channels
    python benchmarks/bench_knowledge_size.py --nodes 20000 --parts 4       # a few seconds
    python benchmarks/bench_knowledge_size.py --store s3://bucket/bench     # credentials from the environment
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import describe, save
from torch import Tensor

from gkd_dist import layout
from gkd_dist.config import PartitionConfig
from gkd_dist.graph import Graph
from gkd_dist.infer.layerwise import edge_scores, one_hop_graph
from gkd_dist.infer.packing import Packing, pack_knowledge
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.entries import ObjectEntry
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import KnowledgeStore, Wants

METRIC = "sqeuclidean"
FORMS = {
    "embeddings fp16": ("embeddings.1", Packing("fp16", "fp16")),
    "scores fp32": (f"scores.1.{METRIC}", Packing("fp16", "fp32")),
    "scores fp16": (f"scores.1.{METRIC}", Packing("fp16", "fp16")),
    "scores uint8": (f"scores.1.{METRIC}", Packing("fp16", "uint8")),
}
REACH = 0.58  # of a part's size: with degree 14 the halo factor comes out near 1


def ring(num_nodes: int, degree: int, reach: int) -> Graph:
    """Undirected: half of ``degree`` edges per node to nodes at most ``reach`` further on, ids in random order."""
    draw = torch.Generator().manual_seed(0)
    start = torch.arange(num_nodes).repeat_interleave(degree // 2)
    end = (start + torch.randint(1, reach + 1, (start.numel(),), generator=draw)) % num_nodes
    names = torch.randperm(num_nodes, generator=draw)
    edges = torch.unique(torch.cat([torch.stack([start, end]), torch.stack([end, start])], 1), dim=1)
    nobody = torch.zeros(num_nodes, dtype=torch.bool)
    return Graph(
        x=torch.zeros(num_nodes, 1),
        edge_index=names[edges],
        y=torch.zeros(num_nodes, dtype=torch.int64),
        train_mask=~nobody,
        val_mask=nobody,
        test_mask=nobody,
        num_classes=2,
        name="ring",
    )


class Case:
    """The graph store, the embeddings of every node, and where each form is stored."""

    def __init__(self, root: Storage, args: argparse.Namespace) -> None:
        graph = ring(args.nodes, args.degree, max(1, round(REACH * args.nodes / args.parts)))
        config = PartitionConfig(num_parts=args.parts)
        build_graph_store(graph, root.child("graph"), config, halo_hops=1, seed=0, fingerprint="a" * 64)
        self.graph, self.root = GraphStore.open(root.child("graph")), root
        self.z = torch.randn(args.nodes, args.channels, generator=torch.Generator().manual_seed(1))
        self.entries: dict[str, list[ObjectEntry]] = {}

    def structure(self, part: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and counts of a graph part."""
        return self.graph.part(part), self.graph.manifest.parts[part].counts

    def compute(self, part: int) -> tuple[dict[str, Tensor], Tensor, float]:
        """(float32 tensors by name, row starts, seconds to compute the scores)."""
        tensors, counts = self.structure(part)
        z = self.z[tensors["n_id"][: counts["num_owned"] + counts["num_halo_1"]]]
        local = one_hop_graph(tensors, counts)
        started = time.perf_counter()
        scores = edge_scores(z, local, [METRIC])[METRIC]
        seconds = time.perf_counter() - started
        return {"embeddings.1": z, f"scores.1.{METRIC}": scores}, tensors["indptr"][: counts["num_owned"] + 1], seconds

    def write(self, form: str, part: int, tensors: dict[str, Tensor], indptr: Tensor) -> tuple[ObjectEntry, float]:
        """Packs and stores one part; returns its entry and the seconds that took."""
        name, packing = FORMS[form]
        started = time.perf_counter()
        stored, meta = pack_knowledge({name: tensors[name]}, indptr, packing, f"part {part}")
        entry = write_shard(self.folder(form), layout.part(part), stored, {}, meta)
        return entry, time.perf_counter() - started

    def folder(self, form: str) -> Storage:
        """Where a form is stored."""
        return self.root.child(form.replace(" ", "-"))

    def read(self, form: str, part: int) -> float:
        """Seconds from stored bytes to float32 scores of a part, which for embeddings are computed."""
        tensors, _ = self.structure(part)
        manifest = Manifest("knowledge", "b" * 64, {}, {}, tuple(self.entries[form]))
        store = KnowledgeStore(self.folder(form), manifest)
        started = time.perf_counter()
        store.part(part, tensors, Wants.of(scores=[(1, METRIC)]))
        return time.perf_counter() - started


def measure(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    """Bytes and best seconds of each form, summed over all parts."""
    forms: dict[str, dict[str, float]] = {form: {"bytes": 0, "write_s": 0, "read_s": 0, "score_s": 0} for form in FORMS}
    for part in range(case.graph.num_parts):
        tensors, indptr, score_s = case.compute(part)
        best = {form: {"write_s": float("inf"), "read_s": float("inf")} for form in FORMS}
        for _ in range(repeats):
            for form, seconds in best.items():
                entry, took = case.write(form, part, tensors, indptr)
                entries = case.entries.setdefault(form, [])
                entries[part:] = [entry]
                seconds["write_s"] = min(seconds["write_s"], took)
            for form, seconds in best.items():
                seconds["read_s"] = min(seconds["read_s"], case.read(form, part))
        for form, total in forms.items():
            total["bytes"] += case.entries[form][part].num_bytes
            total["score_s"] += score_s if form.startswith("scores") else 0.0
            for key, value in best[form].items():
                total[key] += value
    return forms


def summary(case: Case, forms: dict[str, dict[str, float]], channels: int) -> dict[str, Any]:
    """Ratios to embeddings of owned nodes alone and of owned and halo nodes, and the checks."""
    meta = case.graph.manifest.meta
    halo, degree = float(meta["halo_factor"]), meta["num_edges"] / meta["num_nodes"]
    owned_bytes, whole = 2 * channels * meta["num_nodes"], forms["embeddings fp16"]
    ratios = {}
    for form, values in forms.items():
        ratios[form] = {
            "to_owned": values["bytes"] / owned_bytes,
            "to_owned_and_halo": values["bytes"] / whole["bytes"],
            "write": values["write_s"] / whole["write_s"],
            "read": values["read_s"] / whole["read_s"],
        }
    fp16 = ratios["scores fp16"]
    return {
        "average_degree": degree,
        "halo_factor": halo,
        "cut_fraction": meta["cut_fraction"],
        "crossover_degree": {"owned": float(channels), "owned_and_halo": channels * (1 + halo)},
        "forms": forms,
        "ratios": ratios,
        "checks": {
            "fp16 scores at most 1/17 of owned embeddings": fp16["to_owned"] <= 1 / 17,
            "fp16 scores at most 1/30 of owned and halo embeddings": fp16["to_owned_and_halo"] <= 1 / 30,
        },
    }


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    print(f"average degree {result['average_degree']:.2f}, halo factor {result['halo_factor']:.3f}")
    print(f"{'':<16} {'bytes':>14} {'of owned':>9} {'of o+halo':>9} {'score s':>8} {'write s':>8} {'read s':>8}")
    for form, values in result["forms"].items():
        ratio = result["ratios"][form]
        print(
            f"{form:<16} {values['bytes']:>14,.0f} {'1/%.1f' % (1 / ratio['to_owned']):>9} "
            f"{'1/%.1f' % (1 / ratio['to_owned_and_halo']):>9} {values['score_s']:>8.3f} {values['write_s']:>8.3f} "
            f"{values['read_s']:>8.3f}"
        )
    crossover = result["crossover_degree"]
    print(
        f"embeddings are smaller from degree {crossover['owned']:.0f} (owned), {crossover['owned_and_halo']:.0f} (halo)"
    )
    for check, holds in result["checks"].items():
        print(f"{'ok  ' if holds else 'FAIL'}  {check}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--degree", type=int, default=14)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--store", help="URL of an empty folder; default: a temporary one on this machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Storage.open(args.store or str(Path(folder) / "bench")), args)
        result = summary(case, measure(case, args.repeats), args.channels)
    show(result)
    options = {key: value for key, value in vars(args).items() if key != "store"}
    protocol = Storage.open(args.store).protocol if args.store else "file"
    name = f"knowledge-size-{protocol}-n{args.nodes}-k{args.degree}-d{args.channels}-p{args.parts}"
    save(name, {"settings": options, "store": protocol, **result, "environment": describe()})
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
