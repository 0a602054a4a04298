"""Tiles by hand on five nodes, then against the whole graph."""

from __future__ import annotations

import pytest
import torch

from gkd_dist.config import ModelConfig
from gkd_dist.graph import LocalGraph
from gkd_dist.infer.layerwise import compute_layer, with_rows
from gkd_dist.infer.tiles import tile_graph, tile_ranges, tiles
from gkd_dist.models.build import build_model


def graph_of_five() -> LocalGraph:
    """Edges into 0: from 1 and 4; into 1: from 3; into 2: none; into 3: from 3 and 0. Node 4 has no row."""
    edge_index = torch.tensor([[1, 4, 3, 0, 3], [0, 0, 1, 3, 3]])
    return with_rows(LocalGraph.from_edge_index(edge_index, 5), 4)


def test_ranges_hold_at_most_so_many_edges_or_one_row() -> None:
    indptr = torch.tensor([0, 2, 3, 3, 5])
    assert tile_ranges(indptr, 5) == [(0, 4)]
    assert tile_ranges(indptr, 3) == [(0, 3), (3, 4)]
    assert tile_ranges(indptr, 2) == [(0, 1), (1, 3), (3, 4)]
    assert tile_ranges(indptr, 1) == [(0, 1), (1, 3), (3, 4)]
    assert tile_ranges(torch.tensor([0]), 1) == [(0, 0)]


def test_ranges_share_the_edges_about_equally() -> None:
    assert tile_ranges(torch.arange(13), 8) == [(0, 6), (6, 12)]
    assert tile_ranges(torch.arange(13), 11) == [(0, 6), (6, 12)]


def test_a_tile_has_its_rows_first_and_all_their_edges() -> None:
    nodes, tile = tile_graph(graph_of_five(), 1, 4)
    assert nodes.tolist() == [1, 2, 3, 0]
    assert tile.edge_index.tolist() == [[2, 3, 2], [0, 2, 2]]
    assert tile.in_degree.tolist() == [1, 0, 2, 2]
    assert tile.has_self_loop.tolist() == [False, False, True, False]
    assert (tile.num_rows, tile.num_nodes) == (3, 4)
    assert tile.global_ids().tolist() == [1, 2, 3, 0]


def test_one_tile_is_the_graph_itself() -> None:
    graph = graph_of_five()
    assert [(nodes, tile is graph) for nodes, tile in tiles(graph, 5)] == [(None, True)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin", "mlp"])
def test_tiles_together_give_the_layer(kind: str, weighted: bool) -> None:
    random = torch.Generator().manual_seed(0)
    edge_index = torch.randint(40, (2, 200), generator=random)
    weight = torch.rand(200, generator=random) if weighted else None
    graph = with_rows(LocalGraph.from_edge_index(edge_index, 40, weight), 30)
    model = build_model(ModelConfig(kind=kind, hidden=8), 6, 3).eval()
    x = torch.randn(40, 6, generator=random)
    whole = compute_layer(model, 1, x, graph)
    parts = [compute_layer(model, 1, x if nodes is None else x[nodes], tile) for nodes, tile in tiles(graph, 25)]
    assert len(parts) > 4
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
