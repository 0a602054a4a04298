"""What the config asks to be done to a graph's edges and features: pure functions, `Graph` to `Graph`.

Shapes: ``N`` nodes, ``E`` directed edges, ``f`` features of a node, ``a`` of an edge.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from gkd_dist.config import GraphConfig
from gkd_dist.errors import GraphError
from gkd_dist.graph import Graph

_log = logging.getLogger(__name__)


def prepare(graph: Graph, config: GraphConfig) -> Graph:
    """Coalesced, made undirected and normalised as ``config`` says; untouched otherwise."""
    if not config.keep_multi:
        graph, num_dropped = coalesce(graph)
        if num_dropped:
            _log.warning(
                "%s: merged %d duplicate edges%s; set graph.keep_multi=true to keep them",
                graph.name,
                num_dropped,
                "" if graph.edge_weight is None else " and added up their weights",
            )
    if config.undirected:
        graph = add_reverse(graph)
    return normalize_features(graph) if config.normalize_features else graph


def coalesce(graph: Graph) -> tuple[Graph, int]:
    """Each edge once, at its first place; weights of duplicates add up. Also how many went.

    Attributes describe an edge and do not add up: `GraphError` where those of duplicates differ.
    """
    key = _key(graph.edge_index[0], graph.edge_index[1], graph.num_nodes)
    ascending, order = key.sort(stable=True)
    new = torch.ones(key.numel(), dtype=torch.bool)
    new[1:] = ascending[1:] != ascending[:-1]
    num_dropped = key.numel() - int(new.sum())
    if num_dropped == 0:
        return graph, 0
    first = order[new]
    place = first.argsort()  # back to the order in which the edges came
    weight = graph.edge_weight
    if weight is not None:
        groups = new.cumsum(0) - 1
        weight = torch.zeros(first.numel(), dtype=weight.dtype).index_add_(0, groups, weight[order])[place]
    attr = graph.edge_attr
    if attr is not None:
        _check_same_attributes(graph, order, new)
        attr = attr[first[place]]
    edge_index = graph.edge_index[:, first[place]]
    return replace(graph, edge_index=edge_index, edge_weight=weight, edge_attr=attr), num_dropped


def _check_same_attributes(graph: Graph, order: Tensor, new: Tensor) -> None:
    """``order`` int64 [E] brings duplicates together, ``new`` bool [E] marks the first of each."""
    assert graph.edge_attr is not None
    ascending = graph.edge_attr[order]
    differs = (ascending[1:] != ascending[:-1]).any(1) & ~new[1:]
    if differs.any():
        place = int(differs.nonzero()[0])
        source, target = graph.edge_index[:, order[place]].tolist()
        raise GraphError(
            f"{graph.name}: edge {source} -> {target} occurs with different edge_attr (columns {int(order[place])} "
            f"and {int(order[place + 1])} of edge_index), so the two are not one edge; set graph.keep_multi=true to "
            "keep both, set graph.edge_attr=drop to do without attributes, or merge them in the data"
        )


def add_reverse(graph: Graph) -> Graph:
    """The reverse, with the same weight and attributes, of every edge that has none yet, after all others."""
    source, target = graph.edge_index
    there = _key(source, target, graph.num_nodes).sort().values
    reverse = _key(target, source, graph.num_nodes)
    place = torch.searchsorted(there, reverse).clamp_max(there.numel() - 1)
    missing = there[place] != reverse
    edge_index = torch.cat([graph.edge_index, torch.stack([target[missing], source[missing]])], dim=1)
    extend = lambda values: None if values is None else torch.cat([values, values[missing]])  # noqa: E731
    weight, attr = extend(graph.edge_weight), extend(graph.edge_attr)
    return replace(graph, edge_index=edge_index, edge_weight=weight, edge_attr=attr)


def _key(source: Tensor, target: Tensor, num_nodes: int) -> Tensor:
    """One number per edge, ordered by (target, source)."""
    return target * num_nodes + source


def normalize_features(graph: Graph) -> Graph:
    """Feature rows scaled to sum 1; rows of zeros stay zero. Raises `GraphError` on negative features."""
    negative = graph.x < 0
    if negative.any():
        node, column = (int(i) for i in negative.nonzero()[0])
        raise GraphError(
            f"{graph.name}: feature {column} of node {node} is {graph.x[node, column].item():g}, but rows are scaled "
            "to sum 1 only where no feature is negative; set graph.normalize_features=false"
        )
    total = graph.x.sum(1, keepdim=True)
    return replace(graph, x=graph.x / torch.where(total > 0, total, 1.0))
