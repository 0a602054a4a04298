"""Soft-label distillation (Hinton et al., 2015): the student imitates the teacher's probabilities.

With temperature T a node's loss is ``T² KL(softmax(teacher / T) || softmax(student / T))``. T² keeps
the gradient at the size it has for T = 1. Multi-label targets are c yes-or-no questions: the mean over
labels of the binary divergences, so that the scale does not depend on c.

Shapes: ``k`` nodes, ``c`` classes or labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.graph import Task
from gkd_dist.losses.precision import at_least_fp32


def kd_sum(student: Tensor, teacher: Tensor, selected: Tensor | None, temperature: float, task: Task) -> Tensor:
    """Sum of the divergences of the selected nodes, a scalar.

    ``student`` and ``teacher`` logits [k, c]; ``selected`` bool [k] or None for all nodes.
    """
    divergence = _multilabel if task == "multilabel" else _multiclass
    per_node = divergence(student, teacher, temperature)
    if selected is not None:
        per_node = per_node.masked_fill(~selected, 0)
    return per_node.sum() * temperature**2


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    selected: Tensor | None = None,
    task: Task = "multiclass",
) -> Tensor:
    """Mean divergence of the student's probabilities from the teacher's over the selected nodes.

    ``student`` [k, c], where the gradient goes, and ``teacher`` [k, c] are logits; ``selected`` bool
    [k], None for all nodes; task "multiclass" (softmax) or "multilabel" (one sigmoid per label).

    Raises `ConfigError` for a wrong option and `GraphError` for shapes that differ.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be a positive number (got {temperature})")
    if task not in ("multiclass", "multilabel"):
        raise ConfigError(f"task must be multiclass or multilabel (got {task!r})")
    if student.shape != teacher.shape or student.dim() != 2:
        raise GraphError(
            f"logits must have one shape [k, c] (got student {list(student.shape)}, teacher {list(teacher.shape)})"
        )
    count = student.size(0) if selected is None else int(selected.sum())
    return kd_sum(student, teacher, selected, temperature, task) / max(1, count)


def _multiclass(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_s = F.log_softmax(at_least_fp32(student) / temperature, 1)
    log_t = F.log_softmax(at_least_fp32(teacher.detach()) / temperature, 1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)


def _multilabel(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    s, t = at_least_fp32(student) / temperature, at_least_fp32(teacher.detach()) / temperature
    yes = F.kl_div(F.logsigmoid(s), F.logsigmoid(t), reduction="none", log_target=True)
    no = F.kl_div(F.logsigmoid(-s), F.logsigmoid(-t), reduction="none", log_target=True)
    return (yes + no).mean(1)
