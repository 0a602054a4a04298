"""From PyG's ``Data`` to tensors: what is taken, what is refused, and how graphs are joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Data, HeteroData

from gkd_dist.config import EdgeAttr
from gkd_dist.data.pyg_graph import homogeneous, join
from gkd_dist.errors import GraphError


def data(num_nodes: int = 3, **changes: Any) -> Data:
    """A path with one feature and two classes."""
    fields: dict[str, Any] = {
        "x": torch.arange(float(num_nodes)).unsqueeze(1),
        "edge_index": torch.stack([torch.arange(num_nodes - 1), torch.arange(1, num_nodes)]),
        "y": torch.arange(num_nodes) % 2,
    }
    return Data(**{**fields, **changes})


def test_a_graph_is_taken_as_it_is() -> None:
    mask = torch.tensor([True, False, False])
    raw = homogeneous(data(train_mask=mask), "g")
    assert raw.name == "g"
    assert raw.edge_index.tolist() == [[0, 1], [1, 2]]
    assert list(raw.masks) == ["train"]
    assert raw.edge_weight is None


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_features_become_dense(layout: torch.layout) -> None:
    raw = homogeneous(data(x=torch.eye(3).to_sparse(layout=layout)), "g")
    assert raw.x.layout == torch.strided
    assert torch.equal(raw.x, torch.eye(3))


def test_one_feature_without_a_dimension() -> None:
    assert homogeneous(data(x=torch.zeros(3)), "g").x.shape == (3, 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"edge_weight": torch.tensor([1.0, 2.0])}, [1.0, 2.0]),
        ({"edge_weight": torch.tensor([[1.0], [2.0]])}, [1.0, 2.0]),
        ({"edge_attr": torch.tensor([3.0, 4.0])}, [3.0, 4.0]),
        ({"edge_attr": torch.tensor([[3.0], [4.0]])}, [3.0, 4.0]),
        ({"edge_weight": torch.tensor([1.0, 2.0]), "edge_attr": torch.tensor([3.0, 4.0])}, [1.0, 2.0]),
        ({"edge_attr": torch.ones(2, 5)}, None),
    ],
)
def test_where_edge_weights_come_from(fields: dict[str, Any], expected: list[float] | None) -> None:
    weight = homogeneous(data(**fields), "g").edge_weight
    assert (None if weight is None else weight.tolist()) == expected


@pytest.mark.parametrize(
    ("fields", "mode", "weight", "attributes"),
    [
        ({"edge_attr": torch.ones(2, 5)}, "auto", None, [[1.0] * 5] * 2),
        ({"edge_attr": torch.ones(2, 5)}, "drop", None, None),
        ({"edge_attr": torch.tensor([3.0, 4.0])}, "auto", [3.0, 4.0], None),
        ({"edge_attr": torch.tensor([3.0, 4.0])}, "keep", None, [3.0, 4.0]),
        ({"edge_attr": torch.tensor([3.0, 4.0])}, "drop", None, None),
        ({"edge_attr": torch.eye(2).to_sparse()}, "auto", None, [[1.0, 0.0], [0.0, 1.0]]),
        ({"edge_weight": torch.ones(2), "edge_attr": torch.tensor([[3.0], [4.0]])}, "auto", [1.0, 1.0], [[3.0], [4.0]]),
        ({"edge_weight": torch.ones(2), "edge_attr": torch.tensor([[3.0], [4.0]])}, "drop", [1.0, 1.0], None),
    ],
)
def test_where_edge_attributes_come_from(
    fields: dict[str, Any], mode: EdgeAttr, weight: list[float] | None, attributes: list[Any] | None
) -> None:
    raw = homogeneous(data(**fields), "g", mode)
    assert (None if raw.edge_weight is None else raw.edge_weight.tolist()) == weight
    assert (None if raw.edge_attr is None else raw.edge_attr.tolist()) == attributes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, r"g has no node features \(x\)"),
        ({"edge_index": None}, r"g has no edges \(edge_index\)"),
        ({"y": None}, r"g has no node labels \(y\)"),
        ({"y": torch.tensor([1])}, r"labels of shape \[1\] for 3 nodes, so they belong to whole graphs or to edges"),
    ],
)
def test_what_is_no_node_classification_data_set(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        homogeneous(data(**changes), "g")


def test_heterogeneous_graphs_are_refused() -> None:
    hetero = HeteroData()
    hetero["paper"].x = torch.zeros(2, 1)
    hetero["author"].x = torch.zeros(2, 1)
    with pytest.raises(GraphError, match=r"g is heterogeneous \(node types paper, author\), and graphs here are homo"):
        homogeneous(hetero, "g")


# --- several graphs --------------------------------------------------------------------------


def test_later_graphs_move_up() -> None:
    raw = join([(None, homogeneous(data(size), "g")) for size in (3, 2, 4)], "g")
    assert raw.x.flatten().tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert raw.edge_index.tolist() == [[0, 1, 3, 5, 6, 7], [1, 2, 4, 6, 7, 8]]


def test_graphs_of_a_split_become_its_mask() -> None:
    raw = join([(split, homogeneous(data(2), "g")) for split in ("train", "train", "val", "test")], "g")
    assert raw.masks["train"].tolist() == [True] * 4 + [False] * 4
    assert raw.masks["val"].nonzero().flatten().tolist() == [4, 5]
    assert raw.masks["test"].nonzero().flatten().tolist() == [6, 7]


def test_own_masks_are_joined_where_all_graphs_have_them() -> None:
    one = homogeneous(data(2, train_mask=torch.tensor([True, False]), val_mask=torch.tensor([False, True])), "g")
    two = homogeneous(data(2, train_mask=torch.tensor([False, True])), "g")
    raw = join([(None, one), (None, two)], "g")
    assert {split: mask.tolist() for split, mask in raw.masks.items()} == {"train": [True, False, False, True]}


def test_weights_are_joined_where_all_graphs_have_them() -> None:
    weighted, plain = homogeneous(data(2, edge_weight=torch.tensor([2.0])), "g"), homogeneous(data(2), "g")
    both = join([(None, weighted), (None, weighted)], "g").edge_weight
    assert both is not None
    assert both.tolist() == [2.0, 2.0]
    assert join([(None, weighted), (None, plain)], "g").edge_weight is None


def test_attributes_are_joined_where_all_graphs_have_them() -> None:
    one, two = (homogeneous(data(2, edge_attr=torch.tensor([[value, 0.0]])), "g") for value in (2.0, 3.0))
    both = join([(None, one), (None, two)], "g").edge_attr
    assert both is not None
    assert both.tolist() == [[2.0, 0.0], [3.0, 0.0]]
    assert join([(None, one), (None, homogeneous(data(2), "g"))], "g").edge_attr is None
    wide = homogeneous(data(2, edge_attr=torch.zeros(1, 3)), "g")
    with pytest.raises(GraphError, match=r"differ in the shape of edge_attr per edge \(\[2\] and \[3\]\)"):
        join([(None, one), (None, wide)], "g")


def test_graphs_that_do_not_fit_together() -> None:
    wide = homogeneous(data(x=torch.zeros(3, 2)), "g")
    with pytest.raises(GraphError, match=r"differ in the shape of x per node \(\[1\] and \[2\]\)"):
        join([(None, homogeneous(data(), "g")), (None, wide)], "g")
    with pytest.raises(GraphError, match="g holds no graph"):
        join([], "g")
