"""Small graph and knowledge stores for the tests of this folder, written by the real writers."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from gkd_dist import layout
from gkd_dist.config import PartitionConfig
from gkd_dist.graph import Graph
from gkd_dist.losses import edge_scores
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.quantise import pack_float
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

FINGERPRINT = "a" * 64
_NUMBER = itertools.count()


def random_graph(
    num_nodes: int = 30,
    num_edges: int = 90,
    seed: int = 0,
    weighted: bool = False,
    multilabel: bool = False,
    attributed: bool = False,
) -> Graph:
    """A directed graph with self-loops, isolated nodes and unlabelled nodes; attributes are (source, target)."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(num_nodes * num_nodes, (num_edges,), generator=draw).unique()
    masks = [torch.rand(num_nodes, generator=draw) < 0.4 for _ in range(3)]
    y = torch.randint(-1, 3, (num_nodes,), generator=draw)
    return Graph(
        x=torch.randn(num_nodes, 5, generator=draw),
        edge_index=torch.stack([codes % num_nodes, codes // num_nodes]),
        y=torch.nn.functional.one_hot(y.clamp_min(0), 3).float() if multilabel else y,
        train_mask=masks[0],
        val_mask=masks[1],
        test_mask=masks[2],
        num_classes=3,
        task="multilabel" if multilabel else "multiclass",
        edge_weight=torch.rand(codes.numel(), generator=draw) + 0.5 if weighted else None,
        edge_attr=torch.stack([codes % num_nodes, codes // num_nodes], 1).float() if attributed else None,
    )


def graph_store(graph: Graph, num_parts: int, halo_hops: int, folder: Path | None = None, seed: int = 0) -> GraphStore:
    """The graph cut at random, in ``folder`` or in memory."""
    storage = Storage.open(f"memory://stream-{next(_NUMBER)}" if folder is None else str(folder))
    config = PartitionConfig(method="random", num_parts=num_parts)
    build_graph_store(graph, storage, config, halo_hops=halo_hops, seed=seed, fingerprint=FINGERPRINT)
    return GraphStore.open(storage)


def knowledge_store(
    store: GraphStore,
    folder: Path,
    logits: Tensor,
    embeddings: dict[int, Tensor],
    metrics: tuple[str, ...],
    as_scores: bool,
    graph_fingerprint: str = FINGERPRINT,
) -> tuple[Storage, Manifest]:
    """Knowledge of a teacher with ``logits`` [N, c] and ``embeddings`` {layer: [N, d]}, as fp32."""
    storage = Storage.open(str(folder))
    entries = []
    for index, entry in enumerate(store.manifest.parts):
        part, counts = store.part(index), entry.counts
        n_id, inner = part["n_id"], counts["num_owned"] + counts["num_halo_1"]
        values = {"logits": logits[n_id[: counts["num_owned"]]]}
        for layer, z in embeddings.items():
            if not as_scores:
                values[f"embeddings.{layer}"] = z[n_id[:inner]]
                continue
            lengths = torch.diff(part["indptr"][: counts["num_owned"] + 1])
            targets = n_id[: counts["num_owned"]].repeat_interleave(lengths)
            sources = n_id[part["indices"][: counts["num_owned_edges"]].long()]
            for metric in metrics:
                values[f"scores.{layer}.{metric}"] = edge_scores(z, torch.stack([sources, targets]), metric)
        packed = {name: pack_float(value, "fp32") for name, value in values.items()}
        floats = {name: info for name, (_, info) in packed.items()}
        tensors = {name: tensor for name, (tensor, _) in packed.items()}
        entries.append(write_shard(storage, layout.part(index), tensors, {}, {"floats": floats}))
    Manifest("knowledge", "b" * 64, {"graph": graph_fingerprint}, {}, tuple(entries)).save(storage)
    return storage, Manifest.load(storage, "knowledge")
