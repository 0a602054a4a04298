"""Cuts a graph and writes its parts: objects first, the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_dist import layout
from gkd_dist.config import PartitionConfig
from gkd_dist.graph import SPLITS, Graph, LocalGraph
from gkd_dist.partition.assign import assign_parts
from gkd_dist.partition.halo import PartNodes, SendPlan, first_hop, local_edges, part_nodes, send_plans
from gkd_dist.partition.store import KIND, feature_tensors, sparse_features
from gkd_dist.shards.manifest import Manifest, ObjectEntry
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

SPARSE_BELOW = 0.1  # density under which features are stored as CSR: 8 bytes per value against 4 per cell


@dataclass(frozen=True)
class _Source:
    """A graph with its edges in CSR order and the owner of every node."""

    graph: Graph
    local: LocalGraph
    assign: Tensor
    sparse: bool
    sparse_named: frozenset[str] = frozenset()  # which of ``graph.features`` are mostly zeros


def build_graph_store(
    graph: Graph,
    storage: Storage,
    config: PartitionConfig,
    *,
    halo_hops: int,
    seed: int,
    fingerprint: str,
    advance: Callable[[int], None] = lambda done: None,
    before_commit: Callable[[], None] = lambda: None,
) -> Manifest:
    """Writes the graph store and returns its manifest.

    ``halo_hops`` >= 1 hops of halo are stored with each part. ``advance`` is told of each part
    written; ``before_commit`` runs before the manifest and may raise to prevent it.
    """
    assign = assign_parts(config.method, graph.edge_index, graph.num_nodes, config.num_parts, seed)
    local = LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes, graph.edge_weight, graph.edge_attr)
    sparse_named = frozenset(name for name, values in graph.features.items() if is_sparse(values))
    source = _Source(graph, local, assign, is_sparse(graph.x), sparse_named)
    pattern = local.pattern
    nodes = [part_nodes(p, assign, pattern.indptr, pattern.indices, halo_hops) for p in range(config.num_parts)]
    plans = send_plans([first_hop(part) for part in nodes], [part.n_id[: part.num_owned] for part in nodes])
    entries = []
    for part, plan in zip(nodes, plans, strict=True):
        tensors, counts = part_tensors(source, part, plan)
        entries.append(write_shard(storage, layout.part(part.part), tensors, counts, {"hop_ptr": list(part.hop_ptr)}))
        advance(1)
    manifest = Manifest(KIND, fingerprint, {}, graph_meta(source, entries, halo_hops, config.method), tuple(entries))
    before_commit()
    manifest.save(storage)
    return manifest


def part_tensors(source: _Source, part: PartNodes, plan: SendPlan) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors and counts of one part, as `docs/shard-format.md` lists them."""
    graph, local, n_id, num_owned = source.graph, source.local, part.n_id, part.num_owned
    indptr, indices, positions = local_edges(part, local.pattern.indptr, local.pattern.indices)
    owned = n_id[:num_owned]
    t_counts = torch.bincount(indices, minlength=n_id.numel())
    tensors = {
        "n_id": n_id,
        "in_degree": local.in_degree[n_id],
        "has_self_loop": local.has_self_loop[n_id],
        "y": graph.y[owned],
        **{f"{split}_mask": getattr(graph, f"{split}_mask")[owned] for split in SPLITS},
        **_features("x", graph.x[owned], source.sparse),
        **_features("x_halo", graph.x[n_id[num_owned:]], source.sparse),
        **_named_features(source, owned, n_id[num_owned:]),
        "indptr": indptr,
        "indices": indices.to(torch.int32),
        "t_indptr": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(t_counts, 0)]),
        "t_perm": torch.argsort(indices, stable=True).to(torch.int32),
        "halo_owner": part.halo_owner.to(torch.int32),
        "send_part": plan.part,
        "send_ptr": plan.ptr,
        "send_rows": plan.rows,
    }
    if local.edge_weight is not None:
        tensors["edge_weight"] = local.edge_weight[positions]
    if local.edge_attr is not None:
        tensors["edge_attr"] = local.edge_attr[positions]
    return tensors, _counts(tensors, part)


def is_sparse(x: Tensor) -> bool:
    """Whether features [n, f] are smaller as CSR."""
    return int(torch.count_nonzero(x)) < SPARSE_BELOW * x.numel()


def _named_features(source: _Source, owned: Tensor, halo: Tensor) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, values in source.graph.features.items():
        for tensor, nodes in zip(feature_tensors(name), (owned, halo), strict=True):
            tensors |= _features(tensor, values[nodes], name in source.sparse_named)
    return tensors


def _features(name: str, x: Tensor, sparse: bool) -> dict[str, Tensor]:
    return sparse_features(name, x) if sparse else {name: x}


def _counts(tensors: dict[str, Tensor], part: PartNodes) -> dict[str, int]:
    indptr, num_owned = tensors["indptr"], part.num_owned
    num_owned_edges = int(indptr[num_owned])
    rows = torch.repeat_interleave(torch.arange(num_owned), indptr[1 : num_owned + 1] - indptr[:num_owned])
    with_neighbour = torch.unique(rows[tensors["indices"][:num_owned_edges] != rows]).numel()
    return {
        "num_owned": num_owned,
        "num_halo": part.n_id.numel() - num_owned,
        "num_halo_1": part.hop_ptr[1] - num_owned,
        "num_rows": part.num_rows,
        "num_edges": int(indptr[-1]),
        "num_owned_edges": num_owned_edges,
        "num_lsp_nodes": with_neighbour,
        **{f"num_{split}": int(tensors[f"{split}_mask"].sum()) for split in SPLITS},
    }


def graph_meta(source: _Source, entries: list[ObjectEntry], halo_hops: int, method: str) -> dict[str, Any]:
    """What the manifest says of the whole graph and of the quality of the cut."""
    graph, assign = source.graph, source.assign
    owned = torch.tensor([entry.counts["num_owned"] for entry in entries], dtype=torch.float64)
    cut = int((assign[graph.edge_index[0]] != assign[graph.edge_index[1]]).sum())
    degrees = torch.bincount(torch.bincount(graph.edge_index[1], minlength=graph.num_nodes))
    present = torch.nonzero(degrees).flatten()
    return {
        "name": graph.name,
        "num_nodes": graph.num_nodes,
        "num_edges": graph.num_edges,
        "num_features": graph.num_features,
        "features": {name: values.size(1) for name, values in sorted(graph.features.items())},
        "num_classes": graph.num_classes,
        "task": graph.task,
        "num_parts": len(entries),
        "halo_hops": halo_hops,
        "method": method,
        "has_edge_weight": graph.edge_weight is not None,
        "num_edge_features": graph.num_edge_features,
        "undirected": is_undirected(graph.edge_index, graph.num_nodes),
        "sparse_features": source.sparse,
        "edge_cut": cut,
        "cut_fraction": cut / max(1, graph.num_edges),
        "balance": float(owned.max() / owned.mean()),
        "halo_factor": sum(entry.counts["num_halo_1"] for entry in entries) / graph.num_nodes,
        "in_degree_histogram": {str(d): int(degrees[d]) for d in present.tolist()},
        "n_id_hash": hashlib.sha256(assign.numpy().tobytes()).hexdigest(),
    }


def is_undirected(edge_index: Tensor, num_nodes: int) -> bool:
    """True where every edge has its reverse."""
    source, target = edge_index
    return torch.equal(torch.unique(source * num_nodes + target), torch.unique(target * num_nodes + source))
