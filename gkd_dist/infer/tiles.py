"""Row tiles: a layer of a part computed for some target nodes at a time, so that memory follows the tile.

A tile is a range of owned rows with all their in-edges, as a graph of its own. Its size is fixed by
``infer.tile_edges`` and never depends on the memory at hand, so that results do not either: a
dense product of fewer rows may round differently.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gkd_dist.graph import LocalGraph
from gkd_dist.sparse import CsrPattern


def tile_ranges(indptr: Tensor, max_edges: int) -> list[tuple[int, int]]:
    """Ranges of rows of at most ``max_edges`` edges each, or of one row that has more.

    ``indptr`` int64 [o + 1]. Covers all rows in order; one range where everything fits, else about
    equal shares of the edges, so that the largest is as small as it can be.
    """
    num_rows, num_edges = indptr.numel() - 1, int(indptr[-1])
    if num_edges <= max_edges:
        return [(0, num_rows)]
    ranges, start = [], 0
    while start < num_rows:
        left = num_edges - int(indptr[start])
        share = -(-left // max(1, -(-left // max_edges)))
        limit = indptr[start] + share
        stop = int(torch.searchsorted(indptr, limit, right=True)) - 1
        stop = min(num_rows, max(start + 1, stop))
        ranges.append((start, stop))
        start = stop
    return ranges


def tile_graph(graph: LocalGraph, start: int, stop: int) -> tuple[Tensor, LocalGraph]:
    """Rows ``[start, stop)`` of ``graph`` with the nodes that their edges come from.

    Returns the nodes of the tile, int64 [k], numbered as in ``graph``: its rows first, then other
    sources in ascending order; and the graph among them, whose edges keep their order.
    """
    pattern = graph.pattern
    first, last = int(pattern.indptr[start]), int(pattern.indptr[stop])
    sources = pattern.indices[first:last]
    outside = torch.unique(sources)
    outside = outside[(outside < start) | (outside >= stop)]
    rows = torch.arange(start, stop, device=sources.device)
    nodes = torch.cat([rows, outside])
    inside = (sources >= start) & (sources < stop)
    place = torch.where(inside, sources - start, rows.numel() + torch.searchsorted(outside, sources))
    indptr = pattern.indptr[start : stop + 1] - first
    cut = lambda values: None if values is None else values[first:last]  # noqa: E731
    local = LocalGraph(
        CsrPattern.forward_only(indptr, place),
        graph.in_degree[nodes],
        graph.has_self_loop[nodes],
        cut(graph.edge_weight),
        edge_attr=cut(graph.edge_attr),
        n_id=graph.global_ids()[nodes],
    )
    return nodes, local


def tiles(graph: LocalGraph, max_edges: int) -> Iterator[tuple[Tensor | None, LocalGraph]]:
    """`tile_graph` of every range; (None, ``graph``) where it is a single tile."""
    ranges = tile_ranges(graph.pattern.indptr, max_edges)
    if len(ranges) == 1:
        yield None, graph
        return
    for start, stop in ranges:
        yield tile_graph(graph, start, stop)
