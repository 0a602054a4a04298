"""Checks of a graph before anything is computed from it; every message names the offending entry.

`check_arrays` looks at what a source delivered, `check_graph` at the finished graph with its splits.
Both only read.

Shapes: ``N`` nodes, ``E`` directed edges, ``f`` features of a node, ``a`` of an edge.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from gkd_dist.data.raw import RawGraph
from gkd_dist.errors import GraphError
from gkd_dist.graph import SPLITS, Graph

_NEXT_SPLIT = (
    "set graph.split, e.g. {kind: per_class, train: 20, val: 30} (classes) or {kind: random, train: 0.6, val: 0.2}"
)


def check_arrays(raw: RawGraph) -> None:
    """Shapes, number types, node ids and finite values; raises `GraphError`."""
    check_features(raw.name, raw.x)
    check_edges(raw.name, raw.edge_index, raw.num_nodes)
    if raw.edge_weight is not None:
        check_weights(raw.name, raw.edge_weight, raw.edge_index.size(1))
    if raw.edge_attr is not None:
        check_edge_attr(raw.name, raw.edge_attr, raw.edge_index)


def check_features(name: str, x: Tensor) -> None:
    """``x`` must be real, finite [N, f] with N and f at least 1."""
    if x.dim() != 2:
        raise GraphError(f"{name}: x has shape {list(x.shape)}, expected [num_nodes, num_features]; reshape x")
    if x.size(0) == 0:
        raise GraphError(f"{name}: the graph has no nodes (x has shape {list(x.shape)}); check the source")
    if x.size(1) == 0:
        raise GraphError(
            f"{name}: the nodes have no features (x has shape {list(x.shape)}); give every node at least one"
        )
    if x.is_complex():
        raise GraphError(
            f"{name}: x holds complex numbers, expected real ones; store real and imaginary parts as features"
        )
    finite = torch.isfinite(x.float())
    if not finite.all():
        bad = int((~finite).sum())
        node = int((~finite).any(1).nonzero()[0])
        raise GraphError(f"{name}: x holds {bad} NaN or infinite values (first at node {node}); replace or drop them")


def check_edges(name: str, edge_index: Tensor, num_nodes: int) -> None:
    """``edge_index`` must be integer [2, E], E at least 1, with ids in 0 .. ``num_nodes`` - 1."""
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        turned = edge_index.dim() == 2 and edge_index.size(1) == 2
        action = "transpose it" if turned else "row 0 holds sources, row 1 targets"
        raise GraphError(f"{name}: edge_index has shape {list(edge_index.shape)}, expected [2, num_edges]; {action}")
    if edge_index.size(1) == 0:
        raise GraphError(
            f"{name}: the graph has no edges; check edge_index, there is no structure to distill without any"
        )
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
        found = str(edge_index.dtype).removeprefix("torch.") + _first_fraction(edge_index)
        raise GraphError(f"{name}: edge_index holds {found}, expected integer node ids; store it as int64")
    _check_ids(name, edge_index, num_nodes)


def _check_ids(name: str, edge_index: Tensor, num_nodes: int) -> None:
    outside = ((edge_index < 0) | (edge_index >= num_nodes)).any(0)
    if not outside.any():
        return
    edge, count = int(outside.nonzero()[0]), int(outside.sum())
    source, target = (int(i) for i in edge_index[:, edge])
    wrong = target if 0 <= source < num_nodes else source
    raise GraphError(
        f"{name}: edge {edge} ({source} -> {target}) names node {wrong}, but num_nodes is {num_nodes} "
        f"(ids 0 to {num_nodes - 1}; {count} such edge{'s' * (count > 1)} in all); "
        "renumber the nodes from 0, or give x a row for each"
    )


def _first_fraction(values: Tensor) -> str:
    if not values.is_floating_point():
        return ""
    fractional = (values != values.round()).any(0)
    if not fractional.any():
        return ""
    edge = int(fractional.nonzero()[0])
    return f" (edge {edge} is {values[0, edge].item():g} -> {values[1, edge].item():g})"


def check_weights(name: str, edge_weight: Tensor, num_edges: int) -> None:
    """``edge_weight`` must be finite and non-negative, one number per edge."""
    if list(edge_weight.shape) != [num_edges]:
        raise GraphError(
            f"{name}: edge_weight has shape {list(edge_weight.shape)}, expected [{num_edges}]; "
            "give one number per column of edge_index"
        )
    wrong = ~torch.isfinite(edge_weight.float()) | (edge_weight < 0)
    if wrong.any():
        edge = int(wrong.nonzero()[0])
        raise GraphError(
            f"{name}: {int(wrong.sum())} edge weights are negative, NaN or infinite "
            f"(first: edge {edge}, {edge_weight[edge].item():g}), and degrees are sums of weights; "
            "make them finite and at least 0, leave edge_weight out, or set graph.edge_attr=keep where they are a "
            "PyG data set's edge_attr"
        )


def check_edge_attr(name: str, edge_attr: Tensor, edge_index: Tensor) -> None:
    """``edge_attr`` must be real and finite, [E] or [E, a] with a at least 1."""
    shape, num_edges = list(edge_attr.shape), edge_index.size(1)
    if edge_attr.dim() not in (1, 2) or shape[0] != num_edges or shape[-1] == 0:
        raise GraphError(
            f"{name}: edge_attr has shape {shape}, expected [{num_edges}, a] with a at least 1; "
            "give one row per column of edge_index, or set graph.edge_attr=drop"
        )
    if edge_attr.is_complex():
        raise GraphError(
            f"{name}: edge_attr holds complex numbers, expected real ones; store real and imaginary parts as columns"
        )
    wrong = ~torch.isfinite(edge_attr.float()).reshape(num_edges, -1).all(1)
    if wrong.any():
        edge = int(wrong.nonzero()[0])
        source, target = edge_index[:, edge].tolist()
        raise GraphError(
            f"{name}: edge_attr of {int(wrong.sum())} edges is NaN or infinite (first: edge {edge}, {source} -> "
            f"{target}); replace those values, or set graph.edge_attr=drop"
        )


def check_graph(graph: Graph) -> None:
    """Splits that are there, disjoint and labelled; raises `GraphError`."""
    masks = {split: getattr(graph, f"{split}_mask") for split in SPLITS}
    labelled = labelled_nodes(graph.y)
    if not (masks["train"] & labelled).any():
        found = int(masks["train"].sum())
        raise GraphError(
            f"{graph.name}: no labelled training node (train_mask selects {found} nodes, none with a label); "
            f"label some, or {_NEXT_SPLIT}"
        )
    for split, mask in masks.items():
        if not mask.any():
            raise GraphError(f"{graph.name}: {split}_mask selects no node; {_NEXT_SPLIT}")
        check_labelled(graph.name, split, mask, labelled)
    for (one, first), (other, second) in combinations(masks.items(), 2):
        shared = first & second
        if shared.any():
            raise GraphError(
                f"{graph.name}: {one}_mask and {other}_mask share {int(shared.sum())} nodes "
                f"(first: node {int(shared.nonzero()[0])}), expected disjoint splits; "
                f"correct the masks, or {_NEXT_SPLIT}"
            )


def check_labelled(name: str, split: str, mask: Tensor, labelled: Tensor) -> None:
    """Every node of a split must have a label; ``mask`` and ``labelled`` bool [N]."""
    missing = mask & ~labelled
    if missing.any():
        raise GraphError(
            f"{name}: {int(missing.sum())} of the {int(mask.sum())} nodes in {split}_mask have no label "
            f"(first: node {int(missing.nonzero()[0])}); take them out of the mask, or {_NEXT_SPLIT}"
        )


def labelled_nodes(y: Tensor) -> Tensor:
    """Which nodes have a label: bool [N] from ``y`` int64 [N] (-1: none) or float32 [N, c] (NaN: none)."""
    return y >= 0 if y.dim() == 1 else ~y.isnan().any(1)
