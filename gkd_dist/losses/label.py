"""What the labels say: cross-entropy, or binary cross-entropy for multi-label targets.

Unlabelled nodes carry -1 (multiclass) or a row with NaN (multi-label) and are never counted, whatever
the mask says.

Shapes: ``k`` nodes, ``c`` classes or labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gkd_dist.graph import Task
from gkd_dist.losses.precision import at_least_fp32


def labelled(y: Tensor, mask: Tensor, task: Task) -> Tensor:
    """Nodes of ``mask`` (bool [k]) that have a label: bool [k]."""
    return mask & (~y.isnan().any(1) if task == "multilabel" else y >= 0)


def label_sum(logits: Tensor, y: Tensor, mask: Tensor, task: Task) -> Tensor:
    """Sum over labelled nodes of ``mask`` of their cross-entropy, a scalar.

    ``logits`` [k, c]; ``y`` int64 [k], or float [k, c] for multi-label targets, whose binary
    cross-entropies are averaged over the labels of a node.
    """
    logits = at_least_fp32(logits)
    counted = labelled(y, mask, task)
    if task == "multilabel":
        per_label = F.binary_cross_entropy_with_logits(logits, y.nan_to_num().to(logits.dtype), reduction="none")
        return per_label.mean(1).masked_fill(~counted, 0).sum()
    return F.cross_entropy(logits, y.masked_fill(~counted, -1), ignore_index=-1, reduction="sum")
