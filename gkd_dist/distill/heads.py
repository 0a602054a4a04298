"""Projection heads: linear maps that a loss needs between the student's width and the teacher's.

They are trained, wrapped, checkpointed and resumed with the student, beside it and never in it: what is
evaluated, exported and loaded has none of their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gkd_dist.config import FitnetLoss, Loss, resolve_layer
from gkd_dist.distill.module import StudentModule
from gkd_dist.distill.step import seeded
from gkd_dist.errors import ConfigError
from gkd_dist.losses.bounds import named_losses

_HEADS = -2  # counter of the random numbers that initialise heads; the student's own stay what they are


@dataclass(frozen=True)
class HeadSpec:
    """A head of the loss ``name``, which reads student ``layer`` (from 1); the identity unless it ``projects``."""

    name: str
    layer: int
    d_in: int
    d_out: int
    projects: bool

    @property
    def num_params(self) -> int:
        """Of the linear map, 0 without one."""
        return self.d_out * (self.d_in + 1) if self.projects else 0

    def build(self, seed: int) -> nn.Module:
        """[n, d_in] to [n, d_out]; the same weights on every rank."""
        if not self.projects:
            return nn.Identity()
        with seeded(torch.device("cpu"), seed, _HEADS, *self.name.encode()):
            return nn.Linear(self.d_in, self.d_out)


def plan_heads(
    losses: Sequence[Loss],
    student_layers: int,
    student_widths: Mapping[int, int],
    teacher_widths: Mapping[str, int],
) -> tuple[HeadSpec, ...]:
    """A head for every term that compares a student layer with a teacher layer channel by channel.

    ``student_widths`` by layer (from 1), ``teacher_widths`` by the name of the term. Raises
    `ConfigError` where widths differ and no projection is allowed.
    """
    heads = []
    for name, loss in named_losses(losses):
        if not isinstance(loss, FitnetLoss):
            continue
        layer = resolve_layer(loss.student_layer, student_layers)
        d_in, d_out = student_widths[layer], teacher_widths[name]
        if loss.projection == "none" and d_in != d_out:
            raise ConfigError(
                f"loss {name} has projection none, but layer {layer} of the student is {d_in} wide and layer "
                f"{loss.teacher_layer} of the teacher {d_out}; set projection to auto, or make the widths equal"
            )
        projects = loss.projection == "linear" or (loss.projection == "auto" and d_in != d_out)
        heads.append(HeadSpec(name, layer, d_in, d_out, projects))
    return tuple(heads)


def with_heads(
    model: nn.Module, heads: Sequence[HeadSpec], seed: int, state: Mapping[str, Tensor] | None = None
) -> StudentModule:
    """``model`` with its heads beside it, whose weights come from ``state`` (`StudentModule.head_state`), if any."""
    student = StudentModule(model, {head.name: head.build(seed) for head in heads}, {h.name: h.layer for h in heads})
    if state:
        student.heads.load_state_dict(dict(state))
    return student
