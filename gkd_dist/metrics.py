"""Accuracy and micro-F1 from integer counts, so that parts and ranks add up exactly.

Counts are an int64 vector per split: (correct, total) for one class per node, (true positives,
false positives, false negatives) for binary labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dist.graph import Task

NUM_COUNTS = {"multiclass": 2, "multilabel": 3}
METRIC_NAMES = {"multiclass": "accuracy", "multilabel": "micro_f1"}


def predictions(logits: Tensor, task: Task) -> Tensor:
    """Class [n] of each node, or binary labels [n, c] where the logit is above 0."""
    return logits.argmax(1) if task == "multiclass" else (logits > 0).long()


def split_counts(predicted: Tensor, y: Tensor, mask: Tensor, task: Task) -> Tensor:
    """Counts over the labelled nodes of ``mask`` [n], int64 [2] or [3]."""
    if task == "multiclass":
        chosen = mask & (y >= 0)
        correct = (predicted[chosen] == y[chosen]).sum()
        return torch.stack([correct, chosen.sum()])
    chosen = mask & ~torch.isnan(y).any(1)
    labels, guess = y[chosen] > 0.5, predicted[chosen].bool()
    return torch.stack([(guess & labels).sum(), (guess & ~labels).sum(), (~guess & labels).sum()])


def metric_of(counts: Tensor, task: Task) -> float | None:
    """Accuracy or micro-F1; None where nothing was counted."""
    values = counts.tolist()
    if task == "multiclass":
        correct, total = values
        return correct / total if total else None
    tp, fp, fn = values
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
