"""Labels of any form become int64 classes or float32 binary labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gkd_dist.data.labels import read_labels
from gkd_dist.errors import GraphError

NAN = float("nan")


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([0, 2, -1]),
        torch.tensor([[0], [2], [-1]]),
        torch.tensor([0.0, 2.0, NAN]),
        torch.tensor([0, 2, -1], dtype=torch.int8),
    ],
)
def test_classes_in_all_forms(y: Tensor) -> None:
    labels = read_labels("g", y, 3)
    assert labels.y.dtype == torch.int64
    assert labels.y.tolist() == [0, 2, -1]
    assert (labels.num_classes, labels.task) == (3, "multiclass")


def test_binary_labels() -> None:
    labels = read_labels("g", torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8), 2)
    assert labels.y.dtype == torch.float32
    assert labels.y.tolist() == [[0, 1], [1, 1]]
    assert (labels.num_classes, labels.task) == (2, "multilabel")


def test_a_row_of_nan_is_unlabelled() -> None:
    labels = read_labels("g", torch.tensor([[0.0, 1.0], [NAN, NAN]]), 2)
    assert labels.y[1].isnan().all()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1]), r"y has shape \[2\], expected one row for each of the 3 nodes"),
        (torch.zeros(3, 2, 2), r"y has shape \[3, 2, 2\]"),
        (torch.tensor([0.0, 0.5, 1.0]), r"y holds 0\.5 at node 1, expected whole class numbers"),
        (torch.tensor([0, 1, -7]), r"y is -7 at node 2, expected classes from 0"),
        (torch.tensor([0, 7003, 1]), r"y is 7003 at node 1, but 3 nodes cannot have that many classes"),
        (torch.tensor([-1, -1, -1]), "no node has a label"),
        (torch.tensor([0, 0, -1]), "every labelled node has class 0, expected at least two classes"),
        (torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 0.0]]), "y is 3 at node 1, label 1, expected 0 or 1"),
        (torch.tensor([[0.0, 1.0], [NAN, 1.0], [0.0, 0.0]]), r"1 nodes have some labels NaN .* \(first: node 1\)"),
        (torch.full((3, 2), NAN), "no node has a label"),
    ],
)
def test_what_is_no_label_is_named(y: Tensor, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        read_labels("g", y, 3)
