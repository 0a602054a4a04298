"""From PyG's ``Data`` objects to one `RawGraph`: features, edges, labels, weights and masks.

Shapes: ``N`` nodes, ``E`` directed edges, ``k`` alternative splits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd_dist.config import EdgeAttr
from gkd_dist.data.raw import RawGraph
from gkd_dist.errors import GraphError
from gkd_dist.graph import SPLITS

_log = logging.getLogger(__name__)


def homogeneous(data: Any, name: str, attributes: EdgeAttr = "auto") -> RawGraph:
    """One graph of a data set; raises `GraphError` where it is no homogeneous graph with node labels.

    ``attributes`` says what becomes of ``edge_attr``, like ``graph.edge_attr`` of a config.
    """
    if hasattr(data, "node_types"):
        types = ", ".join(str(node_type) for node_type in data.node_types)
        raise GraphError(
            f"{name} is heterogeneous (node types {types}), and graphs here are homogeneous only; choose another one"
        )
    x, edge_index, y = (_tensor(data, key, name) for key in ("x", "edge_index", "y"))
    if x.dim() == 1:
        x = x.unsqueeze(1)
    if y.dim() == 0 or y.size(0) != x.size(0):
        raise GraphError(
            f"{name} has labels of shape {list(y.shape)} for {x.size(0)} nodes, so they belong to whole graphs or to "
            "edges; choose a node classification data set"
        )
    masks = {split: mask for split in SPLITS if isinstance(mask := getattr(data, f"{split}_mask", None), Tensor)}
    return RawGraph(name, x, edge_index, y, masks, *_edge_data(data, edge_index.size(-1), name, attributes))


def _tensor(data: Any, key: str, name: str) -> Tensor:
    value = getattr(data, key, None)
    if not isinstance(value, Tensor):
        words = {"x": "node features (x)", "edge_index": "edges (edge_index)", "y": "node labels (y)"}
        raise GraphError(
            f"{name} has no {words[key]}; choose another data set, or add them, save it with "
            "gkd_dist.save_arrays and use graph.source.kind arrays"
        )
    return value if value.layout == torch.strided else value.to_dense()


def _edge_data(data: Any, num_edges: int, name: str, attributes: EdgeAttr) -> tuple[Tensor | None, Tensor | None]:
    """Weights [E] and attributes [E, a] of the edges.

    Weights are ``edge_weight``; where there is none, ``auto`` takes an ``edge_attr`` of one number per
    edge for them, as many data sets mean it.
    """
    weight, attr = (_optional(data, key) for key in ("edge_weight", "edge_attr"))
    if weight is not None:
        weight = weight.reshape(-1) if weight.numel() == num_edges else weight
    if attr is None or attributes == "drop":
        return weight, None
    if attributes == "auto" and weight is None and attr.numel() == num_edges:
        _log.info("%s: edge_attr, one number per edge, is used as edge_weight", name)
        return attr.reshape(-1), None
    return weight, attr


def _optional(data: Any, key: str) -> Tensor | None:
    value = getattr(data, key, None)
    if not isinstance(value, Tensor):
        return None
    return value if value.layout == torch.strided else value.to_dense()


def join(pieces: Sequence[tuple[str | None, RawGraph]], name: str) -> RawGraph:
    """All graphs of a data set as one disconnected graph, node ids of later ones moved up.

    Each piece comes with the split that all its nodes belong to, or None where its own masks hold.
    """
    if not pieces:
        raise GraphError(f"{name} holds no graph; check graph.source.args")
    graphs = [_with_split(split, graph) for split, graph in pieces]
    if len(graphs) == 1:
        return graphs[0]
    for key, owner in (("x", "node"), ("y", "node"), ("edge_attr", "edge")):
        tensors = [tensor for graph in graphs if (tensor := getattr(graph, key)) is not None]
        widths = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
        if len(widths) > 1:
            raise GraphError(
                f"{name}: graphs of the data set differ in the shape of {key} per {owner} ({list(widths[0])} and "
                f"{list(widths[1])}), so they make no common graph; choose another one"
            )
    starts = torch.tensor([0, *(graph.num_nodes for graph in graphs[:-1])]).cumsum(0).tolist()
    return RawGraph(
        name=name,
        x=torch.cat([graph.x for graph in graphs]),
        edge_index=torch.cat([graph.edge_index + start for graph, start in zip(graphs, starts, strict=True)], dim=1),
        y=torch.cat([graph.y for graph in graphs]),
        masks=_join_masks(graphs),
        edge_weight=_join_edge_data([graph.edge_weight for graph in graphs]),
        edge_attr=_join_edge_data([graph.edge_attr for graph in graphs]),
    )


def _join_edge_data(values: Sequence[Tensor | None]) -> Tensor | None:
    """Weights or attributes where every graph has them."""
    there = [value for value in values if value is not None]
    return torch.cat(there) if len(there) == len(values) else None


def _with_split(split: str | None, graph: RawGraph) -> RawGraph:
    if split is None:
        return graph
    return replace(graph, masks={key: torch.full((graph.num_nodes,), key == split) for key in SPLITS})


def _join_masks(graphs: Sequence[RawGraph]) -> dict[str, Tensor]:
    """Masks that every graph has."""
    everywhere = [split for split in SPLITS if all(split in graph.masks for graph in graphs)]
    return {split: torch.cat([graph.masks[split] for graph in graphs]) for split in everywhere}
