"""Edges are merged and reversed, feature rows scaled: by hand on four nodes, then as properties."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from data_graphs import path, with_edges
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.config import GraphConfig
from gkd_dist.data.prepare import add_reverse, coalesce, normalize_features, prepare
from gkd_dist.errors import GraphError
from gkd_dist.graph import Graph

edge_lists = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)
bounded = settings(max_examples=60, deadline=None)


def config(**changes: Any) -> GraphConfig:
    return GraphConfig.model_validate({"source": {"kind": "arrays", "path": "unused"}, **changes})


def edges(graph: Graph) -> list[tuple[int, int]]:
    return [tuple(edge) for edge in graph.edge_index.t().tolist()]


def test_duplicates_keep_their_first_place() -> None:
    graph, dropped = coalesce(with_edges([(2, 3), (0, 1), (2, 3), (1, 2), (0, 1), (2, 3)]))
    assert edges(graph) == [(2, 3), (0, 1), (1, 2)]
    assert dropped == 3


def test_weights_of_duplicates_add_up() -> None:
    graph, _ = coalesce(with_edges([(2, 3), (0, 1), (2, 3)], weight=[1.0, 2.0, 4.0]))
    assert graph.edge_weight is not None
    assert graph.edge_weight.tolist() == [5.0, 2.0]


def with_attributes(edges: list[tuple[int, int]], attributes: list[list[float]]) -> Graph:
    return replace(with_edges(edges), edge_attr=torch.tensor(attributes))


def test_equal_attributes_of_duplicates_are_kept_once() -> None:
    graph, dropped = coalesce(with_attributes([(2, 3), (0, 1), (2, 3)], [[1.0, 5.0], [2.0, 6.0], [1.0, 5.0]]))
    assert (edges(graph), dropped) == ([(2, 3), (0, 1)], 1)
    assert graph.edge_attr is not None
    assert graph.edge_attr.tolist() == [[1.0, 5.0], [2.0, 6.0]]


def test_duplicates_with_other_attributes_are_no_duplicates() -> None:
    drawn = [(2, 3), (0, 1), (2, 3), (0, 1), (0, 1)], [[1.0, 5.0], [2.0, 6.0], [1.0, 5.0], [2.0, 6.0], [2.0, 7.0]]
    with pytest.raises(GraphError) as caught:
        coalesce(with_attributes(*drawn))
    assert str(caught.value) == (
        "path: edge 0 -> 1 occurs with different edge_attr (columns 3 and 4 of edge_index), so the two are not one "
        "edge; set graph.keep_multi=true to keep both, set graph.edge_attr=drop to do without attributes, or merge "
        "them in the data"
    )
    assert prepare(with_attributes(*drawn), config(keep_multi=True)).num_edges == 5


def test_a_graph_without_duplicates_is_untouched() -> None:
    graph = with_edges([(2, 3), (3, 2), (0, 0)])
    assert coalesce(graph) == (graph, 0)


@bounded
@given(edge_lists)
def test_coalescing_leaves_the_set_of_edges(drawn: list[tuple[int, int]]) -> None:
    graph, dropped = coalesce(with_edges(drawn))
    assert edges(graph) == list(dict.fromkeys(drawn))
    assert dropped == len(drawn) - len(set(drawn))


def test_reverse_edges_come_last_and_only_where_they_are_missing() -> None:
    graph = add_reverse(with_edges([(0, 1), (1, 0), (2, 3), (1, 1)], weight=[1.0, 2.0, 3.0, 4.0]))
    assert edges(graph) == [(0, 1), (1, 0), (2, 3), (1, 1), (3, 2)]
    assert graph.edge_weight is not None
    assert graph.edge_weight.tolist() == [1.0, 2.0, 3.0, 4.0, 3.0]


def test_a_reverse_edge_has_the_attributes_of_its_edge() -> None:
    graph = add_reverse(with_attributes([(0, 1), (2, 3), (1, 1)], [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]))
    assert edges(graph) == [(0, 1), (2, 3), (1, 1), (1, 0), (3, 2)]
    assert graph.edge_attr is not None
    assert graph.edge_attr.tolist() == [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [1.0, 5.0], [2.0, 6.0]]


@bounded
@given(edge_lists)
def test_every_edge_has_its_reverse(drawn: list[tuple[int, int]]) -> None:
    found = edges(add_reverse(with_edges(drawn)))
    assert set(found) == {*drawn, *((target, source) for source, target in drawn)}
    assert add_reverse(with_edges(found)).num_edges == len(found)


def test_duplicates_are_reported_once_with_their_count(caplog: pytest.LogCaptureFixture) -> None:
    graph = with_edges([(0, 1), (0, 1), (1, 2), (0, 1)])
    with caplog.at_level(logging.WARNING):
        assert prepare(graph, config()).num_edges == 2
    assert caplog.messages == ["path: merged 2 duplicate edges; set graph.keep_multi=true to keep them"]


def test_keep_multi_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    graph = with_edges([(0, 1), (0, 1)])
    assert prepare(graph, config(keep_multi=True)) is graph
    assert prepare(graph, config(keep_multi=True, undirected=True)).num_edges == 4
    assert not caplog.messages


def test_rows_sum_to_one_and_zeros_stay() -> None:
    graph = normalize_features(path(x=torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.5, 0.0], [0.1, 0.3]])))
    expected = torch.tensor([[0.25, 0.75], [0.0, 0.0], [1.0, 0.0], [0.25, 0.75]])
    torch.testing.assert_close(graph.x, expected)


def test_negative_features_have_no_row_sum() -> None:
    with pytest.raises(GraphError, match="feature 0 of node 2 is -1, but rows are scaled"):
        prepare(path(x=torch.tensor([[0.0], [1.0], [-1.0], [2.0]])), config(normalize_features=True))


def test_nothing_happens_unasked() -> None:
    graph = path()
    assert prepare(graph, config()) is graph
