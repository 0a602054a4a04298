"""Soft-label distillation (Hinton et al., 2015): the student imitates the teacher's probabilities.

With temperature T a node's loss is ``T² KL(softmax(teacher / T) || softmax(student / T))``. T² keeps
the gradient at the size it has for T = 1. Multi-label targets are c yes-or-no questions: the mean over
labels of the binary divergences, so that the scale does not depend on c.

Of a teacher that is known by its k largest logits, the divergence is that of k + 1 outcomes: the k
classes, and "another one". Merging outcomes never adds information, so this is at most the divergence
over all classes, and 0 where that is 0.

Shapes: ``k`` nodes, ``c`` classes or labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.graph import Task
from gkd_dist.losses.precision import at_least_fp32
from gkd_dist.topk import TopK


def kd_sum(student: Tensor, teacher: Tensor | TopK, selected: Tensor | None, temperature: float, task: Task) -> Tensor:
    """Sum of the divergences of the selected nodes, a scalar.

    ``student`` and ``teacher`` logits [k, c], the teacher's also as `TopK`; ``selected`` bool [k] or
    None for all nodes.
    """
    if isinstance(teacher, TopK):
        per_node = _merged(student, teacher, temperature)
    else:
        per_node = (_multilabel if task == "multilabel" else _multiclass)(student, teacher, temperature)
    if selected is not None:
        per_node = per_node.masked_fill(~selected, 0)
    return per_node.sum() * temperature**2


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    temperature: float = 1.0,
    selected: Tensor | None = None,
    task: Task = "multiclass",
) -> Tensor:
    """Mean divergence of the student's probabilities from the teacher's over the selected nodes.

    ``student`` [k, c], where the gradient goes, and ``teacher`` [k, c] are logits, the teacher's also
    as `TopK`; ``selected`` bool [k], None for all nodes; task "multiclass" (softmax) or "multilabel"
    (one sigmoid per label).

    Raises `ConfigError` for a wrong option and `GraphError` for shapes that differ.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be a positive number (got {temperature})")
    if task not in ("multiclass", "multilabel"):
        raise ConfigError(f"task must be multiclass or multilabel (got {task!r})")
    shape = [teacher.num_nodes, teacher.num_classes] if isinstance(teacher, TopK) else list(teacher.shape)
    if list(student.shape) != shape or student.dim() != 2:
        raise GraphError(f"logits must have one shape [k, c] (got student {list(student.shape)}, teacher {shape})")
    if isinstance(teacher, TopK) and task == "multilabel":
        raise ConfigError("labels that are each yes or no have no top-k; give kd_loss the logits of all labels")
    count = student.size(0) if selected is None else int(selected.sum())
    return kd_sum(student, teacher, selected, temperature, task) / max(1, count)


def _multiclass(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_s = F.log_softmax(at_least_fp32(student) / temperature, 1)
    log_t = F.log_softmax(at_least_fp32(teacher.detach()) / temperature, 1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)


def _merged(student: Tensor, teacher: TopK, temperature: float) -> Tensor:
    """Divergence [k] over the teacher's top classes and all others as one outcome."""
    log_all, index = F.log_softmax(at_least_fp32(student) / temperature, 1), teacher.index.long()
    others = log_all.scatter(1, index, float("-inf")).logsumexp(1, keepdim=True)
    log_s = torch.cat([log_all.gather(1, index), others], 1)
    known = [at_least_fp32(teacher.values.detach()) / temperature, teacher.tail_at(temperature).unsqueeze(1)]
    log_t = F.log_softmax(torch.cat(known, 1), 1)
    return F.kl_div(log_s, log_t.to(log_s.dtype), reduction="none", log_target=True).sum(1)


def _multilabel(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    s, t = at_least_fp32(student) / temperature, at_least_fp32(teacher.detach()) / temperature
    yes = F.kl_div(F.logsigmoid(s), F.logsigmoid(t), reduction="none", log_target=True)
    no = F.kl_div(F.logsigmoid(-s), F.logsigmoid(-t), reduction="none", log_target=True)
    return (yes + no).mean(1)
