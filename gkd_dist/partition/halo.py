"""Owned and halo nodes of a part, and the plan by which parts exchange rows. Pure functions.

A part's local order is: owned nodes by ``n_id``, then halo nodes by (hop, owner, ``n_id``). Every
prefix that ends at a hop is therefore a smaller halo of the same part.

Shapes: ``N`` nodes of the graph; ``n`` nodes, ``m`` edges of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.sparse import indptr_from_counts


@dataclass(frozen=True)
class PartNodes:
    """Nodes of one part: ``n_id`` int64 [n] in local order; ``hop_ptr[h]`` = nodes within h hops."""

    part: int
    n_id: Tensor
    hop_ptr: tuple[int, ...]
    halo_owner: Tensor  # int64 [n - num_owned]

    @property
    def num_owned(self) -> int:
        """Nodes that belong to the part."""
        return self.hop_ptr[0]

    @property
    def num_rows(self) -> int:
        """Nodes whose in-edges are stored: all but the outermost hop."""
        return self.hop_ptr[-2]


def gather_rows(indptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of all non-zeros of ``rows`` in row order, and the row lengths.

    Returns (int64 [m], int64 [len(rows)]).
    """
    counts = indptr[rows + 1] - indptr[rows]
    starts = indptr[rows] - (torch.cumsum(counts, 0) - counts)
    positions = torch.repeat_interleave(starts, counts) + torch.arange(int(counts.sum()))
    return positions, counts


def part_nodes(part: int, assign: Tensor, indptr: Tensor, indices: Tensor, halo_hops: int) -> PartNodes:
    """Owned nodes of ``part`` and its in-neighbours up to ``halo_hops`` away.

    ``indptr`` and ``indices`` are the whole graph's in-edges as CSR by target.
    """
    owned = torch.nonzero(assign == part).flatten()
    seen = torch.zeros(assign.numel(), dtype=torch.bool)
    seen[owned] = True
    blocks, hop_ptr, frontier = [owned], [owned.numel()], owned
    for _ in range(halo_hops):
        positions, _ = gather_rows(indptr, frontier)
        neighbours = torch.unique(indices[positions])
        neighbours = neighbours[~seen[neighbours]]
        seen[neighbours] = True
        frontier = neighbours[torch.argsort(assign[neighbours], stable=True)]
        blocks.append(frontier)
        hop_ptr.append(hop_ptr[-1] + frontier.numel())
    n_id = torch.cat(blocks)
    return PartNodes(part, n_id, tuple(hop_ptr), assign[n_id[owned.numel() :]])


def local_edges(nodes: PartNodes, indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In-edges of the part's rows in local numbers.

    Returns (``indptr`` int64 [num_rows + 1], ``indices`` int64 [m], positions int64 [m] of the
    edges in the whole graph). Edges of a row keep their order, by global source id.
    """
    positions, counts = gather_rows(indptr, nodes.n_id[: nodes.num_rows])
    order = torch.argsort(nodes.n_id)
    place = torch.searchsorted(nodes.n_id[order], indices[positions])
    return indptr_from_counts(counts), order[place], positions


@dataclass(frozen=True)
class SendPlan:
    """Owned rows that other parts have in their first halo hop, in those parts' order.

    ``part`` int32 [k]; ``ptr`` int64 [k + 1]; ``rows`` int32 [ptr[-1]], local numbers.
    """

    part: Tensor
    ptr: Tensor
    rows: Tensor


def first_hop(nodes: PartNodes) -> tuple[Tensor, Tensor]:
    """Global ids and owners of a part's first halo hop, ordered by (owner, id)."""
    size = nodes.hop_ptr[1] - nodes.num_owned
    return nodes.n_id[nodes.num_owned : nodes.hop_ptr[1]], nodes.halo_owner[:size]


def send_plans(first_hops: list[tuple[Tensor, Tensor]], owned: list[Tensor]) -> list[SendPlan]:
    """The rows each part has to send, for all parts at once.

    ``first_hops[q]`` is `first_hop` of part q and ``owned[p]`` the sorted global ids of part p.
    """
    wanted: list[list[tuple[int, Tensor]]] = [[] for _ in owned]
    for receiver, (ids, owners) in enumerate(first_hops):
        parts, counts = torch.unique_consecutive(owners, return_counts=True)
        for sender, block in zip(parts.tolist(), ids.split(counts.tolist()), strict=True):
            wanted[sender].append((receiver, torch.searchsorted(owned[sender], block)))
    return [_send_plan(blocks) for blocks in wanted]


def _send_plan(blocks: list[tuple[int, Tensor]]) -> SendPlan:
    counts = torch.tensor([rows.numel() for _, rows in blocks], dtype=torch.int64)
    rows = torch.cat([rows for _, rows in blocks]) if blocks else torch.empty(0, dtype=torch.int64)
    receivers = torch.tensor([receiver for receiver, _ in blocks], dtype=torch.int32)
    return SendPlan(receivers, indptr_from_counts(counts), rows.to(torch.int32))
