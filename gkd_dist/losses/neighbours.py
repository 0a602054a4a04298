"""Which edges a structure term looks at, sorted once and kept.

Shapes: ``n`` nodes; ``m`` edges that are looked at, of ``E`` that were given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.errors import GraphError
from gkd_dist.graph import LocalGraph
from gkd_dist.sampling import copies, edge_hashes, keep_smallest
from gkd_dist.sparse import CsrPattern, indptr_from_counts


@dataclass(frozen=True)
class Neighbours:
    """In-edges by target, as a softmax over the in-neighbours of each node needs them.

    ``pattern`` has n rows and m edges, row = target; ``rows`` int64 [m] is the target of each edge;
    ``picked`` int64 [m] is the place of each edge among the E edges it was taken from;
    ``num_nodes`` counts the targets that have an edge.
    """

    pattern: CsrPattern
    rows: Tensor
    picked: Tensor
    num_nodes: int

    @classmethod
    def of_edges(cls, edge_index: Tensor, num_nodes: int, *, self_loops: bool = False) -> Neighbours:
        """From ``edge_index`` int64 [2, E] in any order, without self-loops unless told otherwise.

        Raises `GraphError` for another shape or dtype, or for a node that is not in 0..num_nodes-1.
        """
        _check_edges(edge_index, num_nodes)
        source, target = edge_index
        order = torch.argsort(source, stable=True)
        order = order[torch.argsort(target[order], stable=True)]
        if not self_loops:
            order = order[source[order] != target[order]]
        counts = torch.bincount(target[order], minlength=num_nodes)
        pattern = CsrPattern.from_csr(indptr_from_counts(counts), source[order])
        return cls(pattern, target[order], order, int((counts > 0).sum()))

    @classmethod
    def of_graph(cls, graph: LocalGraph, num_owned: int, *, self_loops: bool = False) -> Neighbours:
        """In-edges of the first ``num_owned`` nodes of ``graph``; made once per graph and kept with it."""

        def build() -> Neighbours:
            pattern, rows = graph.pattern, graph.pattern.rows()
            keep = rows < num_owned
            if not self_loops:
                keep &= rows != pattern.indices
            picked = torch.nonzero(keep).squeeze(1)
            if picked.numel() < pattern.nnz:
                pattern, rows = pattern.select(keep), rows[picked]
            lengths = pattern.indptr[1:] - pattern.indptr[:-1]
            return cls(pattern, rows, picked, int((lengths > 0).sum()))

        return graph.derived(f"neighbours {num_owned} {self_loops}", build)

    def sampled(self, graph: LocalGraph, layer: int, k: int) -> Neighbours:
        """At most ``k`` in-edges of each target, by the noise of ``graph``, of which all edges were taken.

        They are among those that layer ``layer`` of a sampled forward pass looks at, where it takes ``k`` or more.
        """
        assert graph.noise is not None, "sampling belongs to a step"
        source = self.pattern.indices
        hashes = edge_hashes(graph.noise.key, layer, graph.global_ids(), self.rows, source, copies(self.rows, source))
        keep = keep_smallest(self.pattern.indptr[1:] - self.pattern.indptr[:-1], hashes, k)
        return Neighbours(self.pattern.select(keep), self.rows[keep], self.picked[keep], self.num_nodes)

    @property
    def num_edges(self) -> int:
        """m."""
        return self.pattern.nnz


def union_edges(first: Tensor, second: Tensor, num_nodes: int) -> Tensor:
    """Set union of two edge lists over the same nodes, sorted by (target, source).

    For networks that build a graph each (DGCNN): both local structures are taken over the union, and
    an edge that only one of them has is a virtual edge of the other. ``first``, ``second`` int64
    [2, E1] and [2, E2]; returns int64 [2, E].
    """
    _check_edges(first, num_nodes)
    _check_edges(second, num_nodes)
    edges = torch.cat([first, second], 1)
    keys = torch.unique(edges[1] * max(1, num_nodes) + edges[0])
    return torch.stack([keys % max(1, num_nodes), torch.div(keys, max(1, num_nodes), rounding_mode="floor")])


def _check_edges(edge_index: Tensor, num_nodes: int) -> None:
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
        raise GraphError(f"edge_index must be int64 [2, E] (got {edge_index.dtype} {list(edge_index.shape)})")
    if edge_index.numel():
        low, high = (int(bound) for bound in torch.aminmax(edge_index))
        if low < 0 or high >= num_nodes:
            wrong = low if low < 0 else high
            raise GraphError(f"edge_index names node {wrong}, but there are {num_nodes} nodes (0..{num_nodes - 1})")
