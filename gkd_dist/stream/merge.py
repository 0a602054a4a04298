"""Merges parts into one training subgraph: pure functions on tensors.

Merging puts back what the cut took away: a halo node that another part of the unit owns becomes an
owned node, and the edges between the parts are inner edges again. What is left of the halo is that
of the union, so merging all parts of a graph gives the graph itself.

Shapes: ``n`` nodes, ``m`` edges of the merged graph; ``k`` candidates, i.e. nodes of all parts one
after the other, where a node counts once per part it occurs in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.graph import LocalGraph
from gkd_dist.partition.halo import gather_rows
from gkd_dist.sparse import CsrPattern, indptr_from_counts


@dataclass(frozen=True)
class LocalPart:
    """A stored part, of which the halo is used up to some hop.

    ``hop_ptr[h]`` is the number of nodes within h hops, for h = 0 (owned) to the last hop used.
    """

    index: int
    tensors: dict[str, Tensor]
    hop_ptr: tuple[int, ...]

    @property
    def num_owned(self) -> int:
        """Nodes that belong to the part."""
        return self.hop_ptr[0]

    @property
    def num_nodes(self) -> int:
        """Owned and halo nodes in use."""
        return self.hop_ptr[-1]

    @property
    def num_rows(self) -> int:
        """Nodes whose in-edges are in use: all but the outermost hop."""
        return self.hop_ptr[-2]

    @property
    def num_edges(self) -> int:
        """In-edges of the rows in use."""
        return int(self.tensors["indptr"][self.num_rows])

    def hops(self) -> Tensor:
        """Distance of each node to the owned ones, int64 [num_nodes]."""
        ends = torch.tensor(self.hop_ptr)
        return torch.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))

    def owners(self) -> Tensor:
        """Part that owns each node, int64 [num_nodes]."""
        halo = self.tensors["halo_owner"][: self.num_nodes - self.num_owned].long()
        return torch.cat([torch.full((self.num_owned,), self.index), halo])

    def row_lengths(self) -> Tensor:
        """In-edges in use of each node, int64 [num_nodes]; none at the outermost hop."""
        lengths = torch.diff(self.tensors["indptr"][: self.num_rows + 1])
        return torch.cat([lengths, lengths.new_zeros(self.num_nodes - self.num_rows)])


@dataclass(frozen=True)
class MergedNodes:
    """Which candidate each merged node is taken from, and where each candidate went.

    ``source`` int64 [n] is a candidate, ``place`` int64 [k] a merged node. Merged nodes are ordered
    by (hop, owner, ``n_id``), like those of a single part.
    """

    source: Tensor
    place: Tensor
    num_owned: int
    num_rows: int
    starts: tuple[int, ...]  # first candidate of each part, and k

    def take(self, blocks: Iterable[Tensor]) -> Tensor:
        """Rows of the merged nodes from ``blocks``, one [num_nodes, ...] per part, read one by one."""
        out: Tensor | None = None
        for start, stop, block in zip(self.starts, self.starts[1:], blocks, strict=False):
            if out is None:
                out = block.new_empty(self.source.numel(), *block.shape[1:])
            here = torch.nonzero((self.source >= start) & (self.source < stop)).flatten()
            out[here] = block[self.source[here] - start]
        assert out is not None, "a unit has at least one part"
        return out


def merge_nodes(parts: Sequence[LocalPart]) -> MergedNodes:
    """Every node of the parts once: in the part that owns it, else where it is fewest hops away.

    The row of a node that is fewer than the used hops away from any owned node is complete there,
    because the distance to the union is the smallest distance to a part.
    """
    n_id = torch.cat([part.tensors["n_id"][: part.num_nodes] for part in parts])
    hop = torch.cat([part.hops() for part in parts])
    owner = torch.cat([part.owners() for part in parts])
    order = _lexsort(hop, n_id)
    ids = n_id[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    chosen = order[first]  # ascending n_id
    final = _lexsort(owner[chosen], hop[chosen])
    source = chosen[final]
    rank = torch.empty_like(final)
    rank[final] = torch.arange(final.numel())
    place = torch.empty_like(order)
    place[order] = rank[torch.cumsum(first, 0) - 1]
    num_owned, outermost = sum(part.num_owned for part in parts), len(parts[0].hop_ptr) - 1
    num_rows = int((hop[source] < outermost).sum())
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.num_nodes)
    return MergedNodes(source, place, num_owned, num_rows, tuple(starts))


def _lexsort(minor: Tensor, major: Tensor) -> Tensor:
    """Order by ``major``, then ``minor``, then position."""
    order = torch.argsort(minor, stable=True)
    return order[torch.argsort(major[order], stable=True)]


def merge_edges(parts: Sequence[LocalPart], nodes: MergedNodes) -> LocalGraph:
    """The merged graph; edges of a row stay ascending by the source's global id."""
    indptr_all = indptr_from_counts(torch.cat([part.row_lengths() for part in parts]))
    sources = zip(parts, nodes.starts, strict=False)
    candidates = torch.cat([part.tensors["indices"][: part.num_edges].long() + start for part, start in sources])
    positions, counts = gather_rows(indptr_all, nodes.source[: nodes.num_rows])
    outermost = counts.new_zeros(nodes.source.numel() - nodes.num_rows)
    indptr = indptr_from_counts(torch.cat([counts, outermost]))
    return LocalGraph(
        CsrPattern.from_csr(indptr, nodes.place[candidates[positions]]),
        nodes.take(part.tensors["in_degree"] for part in parts),
        nodes.take(part.tensors["has_self_loop"] for part in parts),
        _edge_data(parts, "edge_weight", positions),
        nodes.num_owned,
        _edge_data(parts, "edge_attr", positions),
        nodes.take(part.tensors["n_id"] for part in parts),
    )


def _edge_data(parts: Sequence[LocalPart], name: str, positions: Tensor) -> Tensor | None:
    """Weights or attributes of the edges at ``positions`` of all parts one after the other, where there are any."""
    if name not in parts[0].tensors:
        return None
    return torch.cat([part.tensors[name][: part.num_edges] for part in parts])[positions]
