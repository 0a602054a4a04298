"""Accuracy and micro-F1 from integer counts, so that parts and ranks add up exactly.

The counts of a split are int64 [4]: labelled nodes, true positives, predicted positives, actual
positives. With one class per node each node is one prediction and one actual class, and micro-F1
is the accuracy.

Shapes: ``n`` nodes; ``c`` classes, or labels of a multi-label task.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_COUNTS = 4
METRIC_NAMES = {"multiclass": "accuracy", "multilabel": "micro_f1"}


def predicted_labels(logits: Tensor, task: str) -> Tensor:
    """Class per node int64 [n], or (multilabel) which labels apply, bool [n, c], from ``logits`` [n, c]."""
    return logits > 0 if task == "multilabel" else logits.argmax(dim=1)


def split_counts(predicted: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Counts over the labelled nodes of ``mask`` [n]; ``y`` int64 [n] or float [n, c]."""
    if y.dim() == 1:
        used = mask & (y >= 0)
        nodes, true = used.sum(), (predicted[used] == y[used]).sum()
        return torch.stack([nodes, true, nodes, nodes])
    used = mask & ~torch.isnan(y).any(dim=1)
    actual, found = y[used] > 0.5, predicted[used]
    return torch.stack([used.sum(), (actual & found).sum(), found.sum(), actual.sum()])


def metric_of(counts: Tensor) -> float | None:
    """Micro-F1 = 2 true / (predicted + actual); None without labelled nodes, 0 without any positive."""
    nodes, true, predicted, actual = counts.tolist()
    return 2 * true / max(1, predicted + actual) if nodes else None
