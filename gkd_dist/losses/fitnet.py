"""Hints (Romero et al., *FitNets*, ICLR 2015): a layer of the student imitates a layer of the teacher, node by node.

The loss of a node is the mean squared error over the teacher's d channels,
``Σ_d (P z^s − z^t)_d² / d``, with P a trained linear map where the widths differ. The original halves it and sums
over d; the mean does not change with the width of the teacher. ``normalize`` scales both rows to length 1 first
(Joshi et al., TNNLS 2022): then only directions count, and the value lies in [0, 4 / d].

The map P is trained with the student and is no part of it. Released code of later papers left its parameters out of
the optimizer, so that students imitated a random projection of themselves.

Shapes: ``k`` nodes, ``d`` channels of the teacher's layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gkd_dist.errors import GraphError
from gkd_dist.losses.precision import at_least_fp32


def fitnet_sum(projected: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Sum over nodes of the mean squared error of their channels, a scalar in at least fp32.

    ``projected`` [k, d], where the gradient goes, and ``teacher`` [k, d].
    """
    student, target = at_least_fp32(projected), at_least_fp32(teacher.detach())
    if normalize:
        student, target = F.normalize(student, dim=1), F.normalize(target, dim=1)
    return (student - target.to(student.dtype)).square().mean(1).sum()


def fitnet_loss(projected: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    """Mean over nodes of the mean squared error of their channels.

    ``projected`` [k, d] is the student's layer after a projection to the teacher's width, ``teacher``
    [k, d]. Raises `GraphError` for shapes that differ.
    """
    if projected.shape != teacher.shape or projected.dim() != 2:
        raise GraphError(
            f"both layers must have one shape [k, d] (got student {list(projected.shape)}, teacher "
            f"{list(teacher.shape)}); project the student's layer to the teacher's width"
        )
    return fitnet_sum(projected, teacher, normalize) / max(1, projected.size(0))
