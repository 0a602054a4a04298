"""Every check passes on a good graph and names the offending entry of a bad one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_graphs import masks, path, raw_path

from gkd_dist.data.validate import check_arrays, check_graph, labelled_nodes
from gkd_dist.errors import GraphError

NAN = float("nan")


def test_a_good_graph_passes() -> None:
    check_arrays(raw_path(edge_weight=torch.tensor([1.0, 0.0, 2.5]), edge_attr=torch.tensor([[-1], [2], [0]])))
    check_arrays(raw_path(edge_attr=torch.tensor([-1.0, 2.0, 0.0])))
    check_graph(path())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"edge_index": torch.tensor([[0, 1, 9], [1, 2, 3]])},
            "path: edge 2 (9 -> 3) names node 9, but num_nodes is 4 (ids 0 to 3; 1 such edge in all); renumber the "
            "nodes from 0, or give x a row for each",
        ),
        (
            {"edge_index": torch.tensor([[0, -1, 9], [1, 2, 3]])},
            "path: edge 1 (-1 -> 2) names node -1, but num_nodes is 4 (ids 0 to 3; 2 such edges in all); renumber the "
            "nodes from 0, or give x a row for each",
        ),
        (
            {"edge_index": torch.tensor([[0, 1.5], [1, 2]])},
            "path: edge_index holds float32 (edge 1 is 1.5 -> 2), expected integer node ids; store it as int64",
        ),
        (
            {"edge_index": torch.tensor([[0.0, 1.0], [1.0, 2.0]])},
            "path: edge_index holds float32, expected integer node ids; store it as int64",
        ),
        (
            {"edge_index": torch.tensor([[0, 1], [1, 2], [2, 3]])},
            "path: edge_index has shape [3, 2], expected [2, num_edges]; transpose it",
        ),
        (
            {"edge_index": torch.zeros(2, 0, dtype=torch.int64)},
            "path: the graph has no edges; check edge_index, there is no structure to distill without any",
        ),
        (
            {"x": torch.tensor([[0.0], [NAN], [float("inf")], [3.0]])},
            "path: x holds 2 NaN or infinite values (first at node 1); replace or drop them",
        ),
        (
            {"x": torch.zeros(0, 3)},
            "path: the graph has no nodes (x has shape [0, 3]); check the source",
        ),
        (
            {"x": torch.zeros(4, 0)},
            "path: the nodes have no features (x has shape [4, 0]); give every node at least one",
        ),
        (
            {"x": torch.zeros(4)},
            "path: x has shape [4], expected [num_nodes, num_features]; reshape x",
        ),
        (
            {"edge_weight": torch.ones(2)},
            "path: edge_weight has shape [2], expected [3]; give one number per column of edge_index",
        ),
        (
            {"edge_weight": torch.tensor([1.0, -2.0, NAN])},
            "path: 2 edge weights are negative, NaN or infinite (first: edge 1, -2), and degrees are sums of weights; "
            "make them finite and at least 0, leave edge_weight out, or set graph.edge_attr=keep where they are a PyG "
            "data set's edge_attr",
        ),
        (
            {"edge_attr": torch.ones(2, 5)},
            "path: edge_attr has shape [2, 5], expected [3, a] with a at least 1; give one row per column of "
            "edge_index, or set graph.edge_attr=drop",
        ),
        (
            {"edge_attr": torch.ones(3, 0)},
            "path: edge_attr has shape [3, 0], expected [3, a] with a at least 1; give one row per column of "
            "edge_index, or set graph.edge_attr=drop",
        ),
        (
            {"edge_attr": torch.ones(3, 2, dtype=torch.complex64)},
            "path: edge_attr holds complex numbers, expected real ones; store real and imaginary parts as columns",
        ),
        (
            {"edge_attr": torch.tensor([[0.0, 1.0], [NAN, 1.0], [-float("inf"), NAN]])},
            "path: edge_attr of 2 edges is NaN or infinite (first: edge 1, 1 -> 2); replace those values, or set "
            "graph.edge_attr=drop",
        ),
    ],
)
def test_a_bad_array_is_named_exactly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        check_arrays(raw_path(**changes))
    assert str(caught.value) == message


def test_features_too_large_for_float32_are_found() -> None:
    with pytest.raises(GraphError, match="1 NaN or infinite values"):
        check_arrays(raw_path(x=torch.tensor([[0.0], [1e300], [2.0], [3.0]], dtype=torch.float64)))


# --- splits ----------------------------------------------------------------------------------


def test_overlapping_masks_are_named() -> None:
    with pytest.raises(GraphError, match=r"val_mask and test_mask share 1 nodes \(first: node 3\)"):
        check_graph(path(val_mask=masks([], [2, 3], [])["val"]))


def test_an_empty_split_names_the_next_action() -> None:
    with pytest.raises(GraphError, match=r"test_mask selects no node; set graph\.split"):
        check_graph(path(test_mask=torch.zeros(4, dtype=torch.bool)))


def test_no_labelled_training_node() -> None:
    with pytest.raises(
        GraphError, match=r"no labelled training node \(train_mask selects 2 nodes, none with a label\)"
    ):
        check_graph(path(y=torch.tensor([-1, -1, 0, 1])))


@pytest.mark.parametrize(("split", "node"), [("train", 1), ("val", 2), ("test", 3)])
def test_unlabelled_nodes_in_a_split_are_counted(split: str, node: int) -> None:
    y = torch.tensor([0, 1, 0, 1])
    y[node] = -1
    with pytest.raises(GraphError, match=rf"1 of the \d nodes in {split}_mask have no label \(first: node {node}\)"):
        check_graph(path(y=y))


def test_labelled_nodes_of_both_tasks() -> None:
    assert labelled_nodes(torch.tensor([0, -1, 3])).tolist() == [True, False, True]
    assert labelled_nodes(torch.tensor([[0.0, 1.0], [NAN, NAN]])).tolist() == [True, False]
