"""Halo nodes, local edges and send plans: counted on a path, then against a search by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from graphs import graph_of, in_edges, path
from hypothesis import given, settings
from hypothesis import strategies as st
from infer_worlds import make_graph
from torch import Tensor

from gkd_dist.graph import Graph
from gkd_dist.partition.halo import PartNodes, SendPlan, first_hop, gather_rows, local_edges, part_nodes, send_plans


@dataclass
class Cut:
    """A graph and all of its parts."""

    graph: Graph
    assign: Tensor
    nodes: list[PartNodes]
    plans: list[SendPlan]


def cut(graph: Graph, assign: Tensor, num_parts: int, halo_hops: int) -> Cut:
    pattern = in_edges(graph).pattern
    nodes = [part_nodes(p, assign, pattern.indptr, pattern.indices, halo_hops) for p in range(num_parts)]
    plans = send_plans([first_hop(part) for part in nodes], [part.n_id[: part.num_owned] for part in nodes])
    return Cut(graph, assign, nodes, plans)


def edges_of(part: PartNodes, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    pattern = in_edges(graph).pattern
    return local_edges(part, pattern.indptr, pattern.indices)


# --- the path 0 - 1 - 2 | 3 - 4 - 5 ----------------------------------------------------------

HALVES = torch.tensor([0, 0, 0, 1, 1, 1])


def test_one_hop_of_the_path() -> None:
    left, right = cut(path(), HALVES, 2, halo_hops=1).nodes
    assert left.n_id.tolist() == [0, 1, 2, 3]
    assert left.hop_ptr == (3, 4)
    assert left.halo_owner.tolist() == [1]
    assert (left.num_owned, left.num_rows) == (3, 3)
    assert right.n_id.tolist() == [3, 4, 5, 2]
    assert right.halo_owner.tolist() == [0]


def test_two_hops_of_the_path() -> None:
    left, right = cut(path(), HALVES, 2, halo_hops=2).nodes
    assert left.n_id.tolist() == [0, 1, 2, 3, 4]
    assert left.hop_ptr == (3, 4, 5)
    assert (left.num_owned, left.num_rows) == (3, 4)
    assert right.n_id.tolist() == [3, 4, 5, 2, 1]


def test_one_hop_edges_of_the_path() -> None:
    graph = path()
    indptr, indices, positions = edges_of(cut(graph, HALVES, 2, 1).nodes[1], graph)
    # rows 3, 4, 5 with local numbers 0, 1, 2; node 2 is number 3; sources ascend by global id
    assert indptr.tolist() == [0, 2, 4, 5]
    assert indices.tolist() == [3, 1, 0, 2, 1]
    assert positions.tolist() == [5, 6, 7, 8, 9]


def test_two_hop_edges_of_the_path_end_at_the_inner_halo() -> None:
    graph = path()
    indptr, indices, _ = edges_of(cut(graph, HALVES, 2, 2).nodes[1], graph)
    assert indptr.tolist() == [0, 2, 4, 5, 7]
    assert indices[5:].tolist() == [4, 0]  # in-edges of node 2: from 1 (outer halo) and 3 (owned)


@pytest.mark.parametrize("halo_hops", [1, 2, 3])
def test_both_halves_send_their_end_of_the_cut(halo_hops: int) -> None:
    left, right = cut(path(), HALVES, 2, halo_hops).plans
    assert (left.part.tolist(), left.ptr.tolist(), left.rows.tolist()) == ([1], [0, 1], [2])
    assert (right.part.tolist(), right.ptr.tolist(), right.rows.tolist()) == ([0], [0, 1], [0])


def test_more_hops_than_the_graph_has_add_nothing() -> None:
    left = cut(path(), HALVES, 2, halo_hops=6).nodes[0]
    assert left.n_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert left.hop_ptr == (3, 4, 5, 6, 6, 6, 6)


def test_only_in_edges_reach_into_the_halo() -> None:
    graph = graph_of(torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]), 6)  # 0 -> 1 -> ... -> 5
    left, right = cut(graph, HALVES, 2, halo_hops=2).nodes
    assert left.n_id.tolist() == [0, 1, 2]
    assert right.n_id.tolist() == [3, 4, 5, 2, 1]


def test_halo_is_ordered_by_hop_then_owner_then_id() -> None:
    # node 0 of part 0 has in-neighbours 1 to 4 (hop 1) and through them 5 and 6 (hop 2)
    graph = graph_of(torch.tensor([[4, 3, 2, 1, 6, 5], [0, 0, 0, 0, 1, 4]]), 7)
    part = cut(graph, torch.tensor([0, 2, 1, 2, 1, 2, 1]), 3, halo_hops=2).nodes[0]
    assert part.n_id.tolist() == [0, 2, 4, 1, 3, 6, 5]
    assert part.halo_owner.tolist() == [1, 1, 2, 2, 1, 2]
    assert part.hop_ptr == (1, 5, 7)


def test_a_part_without_neighbours_sends_nothing() -> None:
    graph = graph_of(torch.empty(2, 0, dtype=torch.int64), 6)
    for plan in cut(graph, HALVES, 2, halo_hops=1).plans:
        assert (plan.part.numel(), plan.ptr.tolist(), plan.rows.numel()) == (0, [0], 0)


def test_gather_rows_in_any_order_and_none() -> None:
    indptr = torch.tensor([0, 2, 2, 5])
    positions, counts = gather_rows(indptr, torch.tensor([2, 1, 0]))
    assert positions.tolist() == [2, 3, 4, 0, 1]
    assert counts.tolist() == [3, 0, 2]
    assert gather_rows(indptr, torch.empty(0, dtype=torch.int64))[0].tolist() == []


# --- any graph, any cut ----------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, int]:
    """A random directed graph with self-loops, owners drawn at random, and a number of hops."""
    num_nodes, num_parts, hops = draw(st.integers(6, 24)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    graph = make_graph(num_nodes, draw(st.integers(0, 60)), seed=draw(st.integers(0, 1000)))
    owners = draw(st.lists(st.integers(0, num_parts - 1), min_size=num_nodes, max_size=num_nodes))
    return cut(graph, torch.tensor(owners), num_parts, hops), hops


def sources_of(graph: Graph, targets: set[int]) -> set[int]:
    return {s for s, t in graph.edge_index.t().tolist() if t in targets}


@settings(max_examples=30, deadline=None)
@given(cuts())
def test_every_hop_is_the_next_ring_of_in_neighbours(drawn: tuple[Cut, int]) -> None:
    found, hops = drawn
    for part in found.nodes:
        known = set(torch.nonzero(found.assign == part.part).flatten().tolist())
        assert part.n_id[: part.num_owned].tolist() == sorted(known)
        for hop in range(1, hops + 1):
            ring = part.n_id[part.hop_ptr[hop - 1] : part.hop_ptr[hop]].tolist()
            assert set(ring) == sources_of(found.graph, known) - known
            assert ring == sorted(ring, key=lambda node: (int(found.assign[node]), node))
            known |= set(ring)
        assert torch.equal(part.halo_owner, found.assign[part.n_id[part.num_owned :]])


@settings(max_examples=30, deadline=None)
@given(cuts())
def test_every_in_edge_of_a_row_is_there_with_its_global_ends(drawn: tuple[Cut, int]) -> None:
    found, _ = drawn
    whole = in_edges(found.graph)
    for part in found.nodes:
        indptr, indices, positions = edges_of(part, found.graph)
        rows = torch.repeat_interleave(indptr.diff())
        ends = torch.stack([part.n_id[indices], part.n_id[rows]])
        assert torch.equal(ends, whole.edge_index[:, positions])
        targets = part.n_id[: part.num_rows]
        assert indices.numel() == int(torch.isin(found.graph.edge_index[1], targets).sum())
        if indices.numel() > 1:  # rows in local order, sources of a row by global id
            keys = rows * found.graph.num_nodes + ends[0]
            assert bool((keys.diff() > 0).all())


@settings(max_examples=30, deadline=None)
@given(cuts())
def test_what_is_sent_is_the_receivers_first_hop(drawn: tuple[Cut, int]) -> None:
    found, _ = drawn
    received: dict[int, list[tuple[int, list[int]]]] = {part.part: [] for part in found.nodes}
    for sender, plan in zip(found.nodes, found.plans, strict=True):
        assert plan.part.tolist() == sorted(set(plan.part.tolist()) - {sender.part})
        for i, receiver in enumerate(plan.part.tolist()):
            rows = plan.rows[plan.ptr[i] : plan.ptr[i + 1]].long()
            received[receiver].append((sender.part, sender.n_id[: sender.num_owned][rows].tolist()))
    for part in found.nodes:
        arrived = [node for _, ids in sorted(received[part.part]) for node in ids]
        assert arrived == first_hop(part)[0].tolist()
