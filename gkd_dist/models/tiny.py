"""Graphs of some dozen nodes to try a model on, and parts of them as the real store cuts them.

Shapes: ``n`` nodes, ``m`` edges; ``f`` features; ``a`` edge attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gkd_dist.graph import LocalGraph
from gkd_dist.sparse import CsrPattern, indptr_from_counts

_NUM_NODES, _NUM_EDGES = 24, 90


@dataclass(frozen=True)
class TinyGraph:
    """Features [n, f] and edges of a whole tiny graph, or of a part of one."""

    x: Tensor
    graph: LocalGraph

    def to(self, device: torch.device) -> TinyGraph:
        """The same graph on ``device``."""
        return TinyGraph(self.x.to(device), self.graph.to(device))

    def permuted(self, order: Tensor) -> TinyGraph:
        """The same graph with node ``order[k]`` as node k; edges are sorted anew."""
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        graph = self.graph
        edges = place[graph.edge_index]
        permuted = LocalGraph.from_edge_index(edges, order.numel(), graph.edge_weight, graph.edge_attr)
        permuted.n_id = graph.global_ids()[order]
        return TinyGraph(self.x[order], permuted)

    def part(self, owned: Tensor, hops: int) -> tuple[TinyGraph, Tensor]:
        """``owned`` nodes with ``hops`` hops of halo after them, and which nodes of the whole those are.

        As in a stored part, nodes of the outermost hop have no in-edges, but their degrees are those
        of the whole graph.
        """
        source, target = self.graph.edge_index
        inside = torch.zeros(self.x.size(0), dtype=torch.bool, device=self.x.device)
        inside[owned] = True
        rows = inside
        for _ in range(hops):
            rows, inside = inside, inside.clone()
            inside[source[rows[target]]] = True
        halo = inside.clone()
        halo[owned] = False
        nodes = torch.cat([owned, torch.nonzero(halo).flatten()])
        place = torch.zeros_like(inside, dtype=torch.int64)
        place[nodes] = torch.arange(nodes.numel(), device=nodes.device)
        kept = torch.nonzero(rows[target]).flatten()
        kept = kept[torch.argsort(place[target[kept]] * nodes.numel() + place[source[kept]], stable=True)]
        return TinyGraph(self.x[nodes], self._subgraph(nodes, place, kept)), nodes

    def _subgraph(self, nodes: Tensor, place: Tensor, kept: Tensor) -> LocalGraph:
        graph = self.graph
        source, target = place[graph.edge_index[:, kept]]
        pattern = CsrPattern.from_csr(indptr_from_counts(torch.bincount(target, minlength=nodes.numel())), source)
        return LocalGraph(
            pattern,
            graph.in_degree[nodes],
            graph.has_self_loop[nodes],
            None if graph.edge_weight is None else graph.edge_weight[kept],
            edge_attr=None if graph.edge_attr is None else graph.edge_attr[kept],
            n_id=graph.global_ids()[nodes],
        )


def num_ids_of(model: nn.Module) -> int | None:
    """How many nodes ``model`` has something of its own for (its ``num_nodes``); None where it has not."""
    number = getattr(model, "num_nodes", None)
    return number if isinstance(number, int) else None


def random_graph(
    num_features: int, has_edge_weight: bool, num_edge_features: int, num_ids: int | None = None
) -> TinyGraph:
    """Directed, with self-loops and with nodes that have no in-edge; always the same one.

    ``num_ids``: global numbers of its nodes stay below, for models with something for each node of a graph.
    """
    random = torch.Generator().manual_seed(0)
    keys = torch.unique(torch.randint(_NUM_NODES * (_NUM_NODES - 3), (_NUM_EDGES,), generator=random))
    edge_index = torch.stack([keys % _NUM_NODES, keys // _NUM_NODES])
    tiny = _dressed(edge_index, _NUM_NODES, num_features, has_edge_weight, num_edge_features, random)
    tiny.graph.n_id = torch.arange(_NUM_NODES) % (num_ids or _NUM_NODES)
    return tiny


def ring(num_nodes: int, num_features: int, has_edge_weight: bool, num_edge_features: int) -> TinyGraph:
    """Each node has both neighbours as in-edges, so that the far side is ``num_nodes / 2`` hops away."""
    nodes = torch.arange(num_nodes)
    after = (nodes + 1) % num_nodes
    edge_index = torch.cat([torch.stack([nodes, after]), torch.stack([after, nodes])], dim=1)
    random = torch.Generator().manual_seed(1)
    return _dressed(edge_index, num_nodes, num_features, has_edge_weight, num_edge_features, random)


def _dressed(
    edge_index: Tensor, num_nodes: int, num_features: int, has_edge_weight: bool, width: int, random: torch.Generator
) -> TinyGraph:
    num_edges = edge_index.size(1)
    x = torch.randn(num_nodes, num_features, generator=random)
    weight = 0.5 + torch.rand(num_edges, generator=random) if has_edge_weight else None
    attr = torch.randn(num_edges, width, generator=random) if width else None
    return TinyGraph(x, LocalGraph.from_edge_index(edge_index, num_nodes, weight, attr))
