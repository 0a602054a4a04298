"""Which edges are looked at: order, self-loops, owned nodes, unions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import GraphError
from gkd_dist.graph import LocalGraph
from gkd_dist.losses import Neighbours, union_edges

#        2→0, 0→1, 1→1 (loop), 1→0: target 0 has sources 1, 2; target 1 has 0 and itself; target 2 none
EDGES = torch.tensor([[2, 0, 1, 1], [0, 1, 1, 0]])


def test_of_edges_sorts_and_drops_self_loops() -> None:
    neighbours = Neighbours.of_edges(EDGES, 3)
    assert neighbours.pattern.indptr.tolist() == [0, 2, 3, 3]
    assert neighbours.pattern.indices.tolist() == [1, 2, 0]
    assert neighbours.rows.tolist() == [0, 0, 1]
    assert neighbours.picked.tolist() == [3, 0, 1]
    assert (neighbours.num_nodes, neighbours.num_edges) == (2, 3)


def test_self_loops_on_request() -> None:
    neighbours = Neighbours.of_edges(EDGES, 3, self_loops=True)
    assert neighbours.pattern.indices.tolist() == [1, 2, 0, 1]
    assert (neighbours.num_nodes, neighbours.num_edges) == (2, 4)


def test_a_node_whose_only_neighbour_is_itself_is_not_counted() -> None:
    neighbours = Neighbours.of_edges(torch.tensor([[0, 1], [0, 0]]), 2)
    assert neighbours.num_nodes == 1
    assert Neighbours.of_edges(torch.tensor([[1], [1]]), 2).num_nodes == 0


def test_of_graph_looks_at_owned_targets_only_and_once() -> None:
    graph = LocalGraph.from_edge_index(EDGES, 3)  # order 1→0, 2→0, 0→1, 1→1
    first = Neighbours.of_graph(graph, 1)
    assert first.picked.tolist() == [0, 1]
    assert first.pattern.num_rows == 3
    assert Neighbours.of_graph(graph, 1) is first
    assert Neighbours.of_graph(graph, 3).picked.tolist() == [0, 1, 2]
    assert Neighbours.of_graph(graph, 3, self_loops=True).pattern is graph.pattern
    assert Neighbours.of_graph(graph, 0).num_nodes == 0


def test_edges_that_are_none_are_refused() -> None:
    with pytest.raises(GraphError, match="names node -1, but there are 2 nodes"):
        Neighbours.of_edges(torch.tensor([[0], [-1]]), 2)


edge_lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20).map(
    lambda pairs: torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
)


@given(edge_lists, edge_lists)
@settings(max_examples=50, deadline=None)
def test_union_is_the_set_union_symmetric_in_its_arguments(first: torch.Tensor, second: torch.Tensor) -> None:
    union = union_edges(first, second, 6)
    pairs = [tuple(pair) for pair in union.T.tolist()]
    assert pairs == sorted({tuple(p) for p in first.T.tolist() + second.T.tolist()}, key=lambda p: (p[1], p[0]))
    assert torch.equal(union, union_edges(second, first, 6))
    assert torch.equal(union, union_edges(union, first, 6))
