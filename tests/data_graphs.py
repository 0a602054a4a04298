"""Small graphs with known answers for the tests of `gkd_dist.data`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gkd_dist.data.raw import RawGraph
from gkd_dist.graph import Graph


def raw_path(**changes: Any) -> RawGraph:
    """0 -> 1 -> 2 -> 3 with one feature, classes 0 1 0 1 and no masks."""
    raw = RawGraph(
        name="path",
        x=torch.tensor([[0.0], [1.0], [2.0], [3.0]]),
        edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]),
        y=torch.tensor([0, 1, 0, 1]),
    )
    return replace(raw, **changes)


def masks(*nodes: list[int], num_nodes: int = 4) -> dict[str, torch.Tensor]:
    """Masks with these training, validation and test nodes."""
    out = {}
    for split, ids in zip(("train", "val", "test"), nodes, strict=True):
        out[split] = torch.zeros(num_nodes, dtype=torch.bool)
        out[split][ids] = True
    return out


def path(**changes: Any) -> Graph:
    """The same graph, finished: nodes 0 and 1 train, 2 validates, 3 tests."""
    raw, split = raw_path(), masks([0, 1], [2], [3])
    graph = Graph(raw.x, raw.edge_index, raw.y, split["train"], split["val"], split["test"], num_classes=2, name="path")
    return replace(graph, **changes)


def with_edges(edges: list[tuple[int, int]], weight: list[float] | None = None) -> Graph:
    """Four nodes with these edges."""
    edge_weight = None if weight is None else torch.tensor(weight)
    return path(edge_index=torch.tensor(edges).t().contiguous(), edge_weight=edge_weight)
