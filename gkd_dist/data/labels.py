"""Labels as a data set has them, turned into the one form that the rest of the package knows.

Shapes: ``N`` nodes, ``c`` classes or binary labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.errors import GraphError
from gkd_dist.graph import Task


@dataclass(frozen=True)
class Labels:
    """``y`` int64 [N] with -1 for none (multiclass) or float32 [N, c] with NaN rows for none (multilabel)."""

    y: Tensor
    num_classes: int
    task: Task


def read_labels(name: str, y: Tensor, num_nodes: int) -> Labels:
    """``y`` [N] or [N, 1] is multiclass, [N, c] multilabel; raises `GraphError` where it is neither.

    NaN stands for unlabelled in both, -1 too in multiclass labels.
    """
    if y.dim() not in (1, 2) or y.size(0) != num_nodes:
        raise GraphError(
            f"{name}: y has shape {list(y.shape)}, expected one row for each of the {num_nodes} nodes; "
            "use node labels (-1 or NaN where a node has none)"
        )
    if y.dim() == 2 and y.size(1) > 1:
        return _multilabel(name, y.float())
    return _multiclass(name, y.reshape(-1))


def _multiclass(name: str, y: Tensor) -> Labels:
    if y.is_floating_point():
        y = torch.where(y.isnan(), -1.0, y)
        fractional = y != y.round()
        if fractional.any():
            node = int(fractional.nonzero()[0])
            raise GraphError(
                f"{name}: y holds {y[node].item():g} at node {node}, expected whole class numbers; "
                "regression targets cannot be distilled, use classes"
            )
    y = y.long()
    smallest, largest = int(y.min()), int(y.max())
    if smallest < -1:
        node = int((y < -1).nonzero()[0])
        raise GraphError(
            f"{name}: y is {int(y[node])} at node {node}, expected classes from 0, or -1 for none; renumber them"
        )
    if largest < 1:
        what = "no node has a label" if largest < 0 else "every labelled node has class 0"
        raise GraphError(f"{name}: {what}, expected at least two classes; check y")
    if largest >= y.numel():
        node = int(y.argmax())
        raise GraphError(
            f"{name}: y is {largest} at node {node}, but {y.numel()} nodes cannot have that many classes; "
            "number the classes from 0 without gaps"
        )
    return Labels(y, largest + 1, "multiclass")


def _multilabel(name: str, y: Tensor) -> Labels:
    missing = y.isnan()
    partly = missing.any(1) & ~missing.all(1)
    if partly.any():
        raise GraphError(
            f"{name}: {int(partly.sum())} nodes have some labels NaN and others not (first: node "
            f"{int(partly.nonzero()[0])}); an unlabelled node is a whole row of NaN, set the others to 0 or 1"
        )
    wrong = ~missing & (y != 0) & (y != 1)
    if wrong.any():
        node, label = (int(i) for i in wrong.nonzero()[0])
        raise GraphError(
            f"{name}: y is {y[node, label].item():g} at node {node}, label {label}, expected 0 or 1; "
            f"y with {y.size(1)} columns means binary labels, use one column of class numbers for classes"
        )
    if missing.all():
        raise GraphError(f"{name}: no node has a label; check y")
    return Labels(y, y.size(1), "multilabel")
