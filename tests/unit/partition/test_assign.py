"""Owners of nodes: balanced, repeatable, and never a part without a node."""

from __future__ import annotations

import pytest
import torch
from graphs import barbell, path, three_islands
from hypothesis import given, settings
from hypothesis import strategies as st
from infer_worlds import make_graph
from torch import Tensor

from gkd_dist.errors import GraphError
from gkd_dist.graph import Graph
from gkd_dist.partition.assign import _fill_empty_parts, assign_parts


def assigned(graph: Graph, method: str, num_parts: int, seed: int = 0) -> Tensor:
    return assign_parts(method, graph.edge_index, graph.num_nodes, num_parts, seed)


def sizes(assign: Tensor, num_parts: int) -> list[int]:
    return torch.bincount(assign, minlength=num_parts).tolist()


def groups(assign: Tensor) -> list[list[int]]:
    """Nodes of each part, whichever number it has."""
    return sorted(torch.nonzero(assign == part).flatten().tolist() for part in assign.unique())


# --- metis -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_metis_cuts_the_bridge(seed: int) -> None:
    assert groups(assigned(barbell(), "metis", 2, seed)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_metis_does_not_mind_direction_duplicates_and_self_loops() -> None:
    graph = barbell()
    one_way = graph.edge_index[:, graph.edge_index[0] <= graph.edge_index[1]]
    odd = torch.cat([one_way, one_way[:, :3], torch.tensor([[0, 5], [0, 5]])], dim=1)
    assert groups(assign_parts("metis", odd, 8, 2, seed=0)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_metis_is_balanced_and_repeatable() -> None:
    graph = make_graph(num_nodes=400, num_edges=2400)
    first = assigned(graph, "metis", 8, seed=3)
    assert torch.equal(first, assigned(graph, "metis", 8, seed=3))
    assert max(sizes(first, 8)) <= 1.05 * 400 / 8  # METIS allows 3 %; whole nodes add a little
    assert min(sizes(first, 8)) > 0


def test_metis_cuts_less_than_chance() -> None:
    ring = torch.arange(200)
    edges = torch.cat([torch.stack([ring, (ring + hop) % 200]) for hop in (1, 2, 3)], dim=1)

    def cut(method: str) -> int:
        assign = assign_parts(method, edges, 200, 4, seed=0)
        return int((assign[edges[0]] != assign[edges[1]]).sum())

    assert cut("metis") < cut("random") / 5


def test_metis_works_without_edges() -> None:
    assign = assign_parts("metis", torch.empty(2, 0, dtype=torch.int64), 5, 3, seed=0)
    assert min(sizes(assign, 3)) >= 1


@pytest.mark.parametrize("num_parts", [3, 5, 6])
def test_no_part_is_empty_on_a_tiny_graph(num_parts: int) -> None:
    assert min(sizes(assigned(path(), "metis", num_parts), num_parts)) >= 1


def test_an_empty_part_takes_a_node_of_the_largest() -> None:
    assert _fill_empty_parts(torch.tensor([0, 0, 2, 0, 2]), 4).tolist() == [0, 3, 2, 1, 2]


# --- random ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 2**31))
def test_random_parts_differ_by_one_node_at_most(num_nodes: int, data: st.DataObject, seed: int) -> None:
    num_parts = data.draw(st.integers(1, num_nodes))
    none = torch.empty(2, 0, dtype=torch.int64)
    assign = assign_parts("random", none, num_nodes, num_parts, seed)
    found = sizes(assign, num_parts)
    assert len(found) == num_parts
    assert max(found) - min(found) <= 1
    assert torch.equal(assign, assign_parts("random", none, num_nodes, num_parts, seed))


def test_another_seed_gives_other_random_parts() -> None:
    graph = make_graph()
    assert not torch.equal(assigned(graph, "random", 4, seed=0), assigned(graph, "random", 4, seed=1))


def test_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assigned(path(), "random", 2, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


# --- components ------------------------------------------------------------------------------


def test_components_are_kept_whole_and_balanced() -> None:
    # the three nodes fill a part, so the two and the one share the other
    assert assigned(three_islands(), "components", 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert groups(assigned(three_islands(), "components", 3)) == [[0, 1, 2], [3, 4], [5]]


@pytest.mark.parametrize("seed", range(5))
def test_no_edge_between_parts_of_components(seed: int) -> None:
    graph = make_graph(num_nodes=60, num_edges=30, seed=seed)
    assign = assigned(graph, "components", 6)
    assert torch.equal(assign[graph.edge_index[0]], assign[graph.edge_index[1]])
    assert min(sizes(assign, 6)) >= 1


# --- every method ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["metis", "random", "components"])
def test_one_part_owns_everything(method: str) -> None:
    assert assigned(path(), method, 1).tolist() == [0] * 6


@pytest.mark.parametrize("method", ["metis", "random", "components"])
def test_more_parts_than_nodes_are_refused(method: str) -> None:
    with pytest.raises(GraphError, match=r"6 nodes, fewer than partition.num_parts 7; lower partition.num_parts"):
        assigned(path(), method, 7)


def test_more_parts_than_components_are_refused() -> None:
    with pytest.raises(GraphError, match=r"3 connected components, .* 4; .* set partition.method=metis"):
        assigned(three_islands(), "components", 4)
