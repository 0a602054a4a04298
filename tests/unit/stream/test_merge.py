"""Merging parts puts back what the cut took away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_stores import graph_store, random_graph
from torch import Tensor

from gkd_dist.graph import Graph, LocalGraph
from gkd_dist.partition.store import GraphStore, local_graph
from gkd_dist.stream.merge import LocalPart, merge_edges, merge_nodes


def local_part(store: GraphStore, index: int, hops: int) -> LocalPart:
    hop_ptr = tuple(store.manifest.parts[index].meta["hop_ptr"])
    return LocalPart(index, store.part(index), hop_ptr[: hops + 1])


def global_rows(graph: LocalGraph, n_id: Tensor, num_rows: int) -> dict[int, list[tuple[int, float]]]:
    """In-edges of the first rows as {target: [(source, weight), ...]} in global ids, in stored order."""
    weight = torch.ones(graph.num_edges) if graph.edge_weight is None else graph.edge_weight
    edges: dict[int, list[tuple[int, float]]] = {int(n_id[row]): [] for row in range(num_rows)}
    for row, column, w in zip(
        graph.pattern.rows().tolist(), graph.pattern.indices.tolist(), weight.tolist(), strict=True
    ):
        edges[int(n_id[row])].append((int(n_id[column]), w))
    return edges


def whole(graph: Graph) -> LocalGraph:
    return LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes, graph.edge_weight)


# --- by hand ---------------------------------------------------------------------------------


def path_part(index: int) -> LocalPart:
    """Half of the path 0 - 1 - 2 - 3 (both directions) with one hop of halo."""
    n_id, halo_owner = ([0, 1, 2], [1]) if index == 0 else ([2, 3, 1], [0])
    # part 0: 1 -> 0; 0, 2 -> 1          part 1 (local 0 = 2, 1 = 3, 2 = 1): 1, 3 -> 2; 2 -> 3
    indptr, indices = ([0, 1, 3], [1, 0, 2]) if index == 0 else ([0, 2, 3], [2, 1, 0])
    tensors = {
        "n_id": torch.tensor(n_id),
        "halo_owner": torch.tensor(halo_owner, dtype=torch.int32),
        "indptr": torch.tensor(indptr),
        "indices": torch.tensor(indices, dtype=torch.int32),
        "in_degree": torch.tensor([1.0, 2, 2, 1])[n_id],
        "has_self_loop": torch.zeros(3, dtype=torch.bool),
    }
    return LocalPart(index, tensors, (2, 3))


def test_two_halves_of_a_path_make_the_path() -> None:
    parts = [path_part(0), path_part(1)]
    nodes = merge_nodes(parts)
    graph = merge_edges(parts, nodes)
    assert nodes.take(part.tensors["n_id"] for part in parts).tolist() == [0, 1, 2, 3]
    assert nodes.place.tolist() == [0, 1, 2, 2, 3, 1]  # both halo nodes are owned now
    assert (nodes.num_owned, nodes.num_rows) == (4, 4)
    assert graph.pattern.indptr.tolist() == [0, 1, 3, 5, 6]
    assert graph.pattern.indices.tolist() == [1, 0, 2, 1, 3, 2]
    assert graph.in_degree.tolist() == [1, 2, 2, 1]
    assert graph.num_owned == 4


# --- against the whole graph -----------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_all_parts_make_the_graph(num_parts: int, hops: int, weighted: bool) -> None:
    graph = random_graph(weighted=weighted)
    store = graph_store(graph, num_parts, hops)
    parts = [local_part(store, index, hops) for index in range(num_parts)]
    nodes = merge_nodes(parts)
    merged, expected = merge_edges(parts, nodes), whole(graph)
    n_id = nodes.take(part.tensors["n_id"] for part in parts)
    assert sorted(n_id.tolist()) == list(range(graph.num_nodes)), "no halo is left"
    every = torch.arange(graph.num_nodes)
    assert global_rows(merged, n_id, graph.num_nodes) == global_rows(expected, every, graph.num_nodes)
    assert torch.equal(merged.in_degree, expected.in_degree[n_id])
    assert torch.equal(merged.has_self_loop, expected.has_self_loop[n_id])
    assert_is_transpose(merged)


@pytest.mark.parametrize("hops", [1, 2])
def test_merging_one_part_is_that_part(hops: int) -> None:
    store = graph_store(random_graph(weighted=True), 3, halo_hops=2)
    part = local_part(store, 1, hops)
    nodes = merge_nodes([part])
    merged, stored = merge_edges([part], nodes), local_graph(part.tensors, part.num_nodes, part.num_rows)
    assert nodes.source.tolist() == nodes.place.tolist() == list(range(part.num_nodes))
    assert (nodes.num_owned, nodes.num_rows) == (part.num_owned, part.num_rows)
    for name in ("indptr", "indices", "t_indptr", "t_indices", "t_perm"):
        assert torch.equal(getattr(merged.pattern, name), getattr(stored.pattern, name)), name
    assert torch.equal(merged.in_degree, stored.in_degree)
    assert merged.edge_weight is not None
    assert stored.edge_weight is not None
    assert torch.equal(merged.edge_weight, stored.edge_weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 3), st.data())
def test_merged_rows_are_the_rows_of_the_graph(seed: int, num_parts: int, hops: int, data: st.DataObject) -> None:
    graph = random_graph(num_nodes=20, num_edges=data.draw(st.integers(0, 60)), seed=seed)
    store = graph_store(graph, num_parts, hops, seed=seed)
    members = sorted(data.draw(st.sets(st.integers(0, num_parts - 1), min_size=1)))
    parts = [local_part(store, index, hops) for index in members]
    nodes = merge_nodes(parts)
    merged = merge_edges(parts, nodes)
    n_id = nodes.take(part.tensors["n_id"] for part in parts)
    owned = torch.cat([part.tensors["n_id"][: part.num_owned] for part in parts])
    assert torch.equal(n_id[: nodes.num_owned], owned), "owned nodes come first, part after part"
    distance = hop_distance(graph, owned)
    assert sorted(n_id.tolist()) == torch.nonzero(distance <= hops).flatten().tolist(), "the halo is that of the union"
    assert (distance[n_id[: nodes.num_rows]] < hops).all()
    expected = global_rows(whole(graph), torch.arange(graph.num_nodes), graph.num_nodes)
    found = global_rows(merged, n_id, nodes.num_rows)
    assert found == {node: expected[node] for node in n_id[: nodes.num_rows].tolist()}


def hop_distance(graph: Graph, owned: Tensor) -> Tensor:
    """In-edges between each node and the nearest of ``owned``; large where there is no path."""
    distance = torch.full((graph.num_nodes,), 99)
    distance[owned] = 0
    for _ in range(graph.num_nodes):
        source, target = graph.edge_index
        distance = distance.scatter_reduce(0, source, distance[target] + 1, "amin")
    return distance


def assert_is_transpose(graph: LocalGraph) -> None:
    pattern = graph.pattern
    assert torch.equal(pattern.rows()[pattern.t_perm], pattern.t_indices)
    columns = torch.repeat_interleave(torch.arange(graph.num_nodes), torch.diff(pattern.t_indptr))
    assert torch.equal(pattern.indices[pattern.t_perm], columns)
