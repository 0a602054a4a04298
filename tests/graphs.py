"""Graphs that a reader can draw, with answers that can be counted on the drawing.

::

    path         0 - 1 - 2 - 3 - 4 - 5

    barbell      0 - 1       4 - 5
                 | X |       | X |        two complete graphs of four nodes and one bridge
                 2 - 3 ----- 6 - 7

    three_islands   0 - 1 - 2   3 - 4   5↺

A line is an edge in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd_dist.graph import Graph, LocalGraph

NUM_FEATURES, NUM_CLASSES = 3, 2


def both_ways(pairs: Iterable[tuple[int, int]]) -> Tensor:
    """``edge_index`` [2, m] of lines."""
    return torch.tensor([edge for a, b in pairs for edge in ((a, b), (b, a))]).t().contiguous()


def graph_of(edge_index: Tensor, num_nodes: int, **changes: Any) -> Graph:
    """Node i has the features (i, i², 1) and class i mod 2; it trains, validates and tests by turns."""
    node = torch.arange(num_nodes)
    graph = Graph(
        x=torch.stack([node, node**2, torch.ones_like(node)], dim=1).float(),
        edge_index=edge_index,
        y=node % 2,
        train_mask=node % 3 == 0,
        val_mask=node % 3 == 1,
        test_mask=node % 3 == 2,
        num_classes=NUM_CLASSES,
        name="drawing",
    )
    return replace(graph, **changes)


def path(**changes: Any) -> Graph:
    """Six nodes in a row."""
    return graph_of(both_ways((i, i + 1) for i in range(5)), 6, **changes)


def barbell() -> Graph:
    """Two complete graphs of four nodes, joined by 3 - 6."""
    cliques = [(a + s, b + s) for s in (0, 4) for a in range(4) for b in range(a)]
    return graph_of(both_ways([*cliques, (3, 6)]), 8)


def three_islands() -> Graph:
    """Components of three, two and one nodes; the single node has a self-loop."""
    edges = torch.cat([both_ways([(0, 1), (1, 2), (3, 4)]), torch.tensor([[5], [5]])], dim=1)
    return graph_of(edges, 6)


def in_edges(graph: Graph) -> LocalGraph:
    """The whole graph as CSR by target."""
    return LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes, graph.edge_weight)
