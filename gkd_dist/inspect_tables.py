"""Shards as Parquet for people without this package: a table of nodes and one of edges per part.

::

    <url>/nodes/part-00000.parquet   n_id, part, in_degree, has_self_loop, y, *_mask, x, logits, embeddings.<layer>
    <url>/edges/part-00000.parquet   source, target, is_cut, edge_weight, edge_attr, scores.<layer>.<metric>

Node numbers are those of the whole graph. Every node and every edge is in exactly one part. Packed
floats are float32 here; matrices are lists of fixed size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gkd_dist import layout
from gkd_dist.errors import ConfigError, DataError
from gkd_dist.partition.store import GraphStore, feature_tensors, features
from gkd_dist.sparse import row_index
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import KnowledgeStore

_PER_NODE = ("in_degree", "has_self_loop", "y", "train_mask", "val_mask", "test_mask")
_PER_EDGE = ("edge_weight", "edge_attr")


def write_tables(
    graph: GraphStore,
    knowledge: KnowledgeStore | None,
    parts: Sequence[int],
    out: Storage,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """Writes the tables of ``parts`` into ``out``, one part at a time, and returns their keys.

    Raises ConfigError where ``out`` holds tables of other parts.
    """
    if knowledge is not None:
        knowledge.manifest.require_input("graph", graph.manifest.fingerprint, knowledge.storage.url)
    written = {f"{name}/{layout.part(part)}.parquet" for part in parts for name in ("nodes", "edges")}
    others = [key for name in ("nodes", "edges") for key in out.list(name) if key not in written]
    if others:
        raise ConfigError(
            f"{out.url} holds tables of other parts ({others[0]}, {len(others)} in all), with which these would be "
            "mixed; give an empty folder"
        )
    keys = []
    for part in parts:
        for name, columns in part_tables(graph, knowledge, part).items():
            keys.append(f"{name}/{layout.part(part)}.parquet")
            out.write(keys[-1], _parquet(columns))
        advance()
    return keys


def part_tables(graph: GraphStore, knowledge: KnowledgeStore | None, part: int) -> dict[str, dict[str, Tensor]]:
    """Columns of the owned nodes (``nodes``) and of their in-edges (``edges``) of one part."""
    tensors, counts = graph.part(part), graph.manifest.parts[part].counts
    num_owned, num_edges = counts["num_owned"], counts["num_owned_edges"]
    n_id, indptr = tensors["n_id"], tensors["indptr"][: num_owned + 1]
    sources = tensors["indices"][:num_edges].long()
    nodes = {"n_id": n_id[:num_owned], "part": torch.full((num_owned,), part, dtype=torch.int32)}
    nodes |= {name: tensors[name][:num_owned] for name in _PER_NODE}
    for named in (None, *graph.manifest.meta.get("features", {})):
        name = feature_tensors(named)[0]
        nodes[name] = features(tensors, name, graph.num_features_of(named))
    edges = {"source": n_id[sources], "target": n_id[row_index(indptr)], "is_cut": sources >= num_owned}
    edges |= {name: tensors[name][:num_edges] for name in _PER_EDGE if name in tensors}
    if knowledge is not None:
        _add_knowledge(nodes, edges, knowledge.values(part, tensors), num_owned, num_edges, knowledge.storage.url)
    return {"nodes": nodes, "edges": edges}


def _add_knowledge(
    nodes: dict[str, Tensor],
    edges: dict[str, Tensor],
    stored: Mapping[str, Tensor],
    num_owned: int,
    num_edges: int,
    where: str,
) -> None:
    for name, values in sorted(stored.items()):
        table, size = (edges, num_edges) if name.startswith("scores.") else (nodes, num_owned)
        if values.size(0) < size:
            raise DataError(f"{name} in {where} has {values.size(0)} rows, expected {size}; run `gkd infer` again")
        table[name] = values[:size]


def _parquet(columns: Mapping[str, Tensor]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, tensor in columns.items():
        flat = pa.array(tensor.contiguous().reshape(-1).numpy())
        arrays[name] = flat if tensor.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, tensor.size(1))
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink, compression="zstd")
    return sink.getvalue()
