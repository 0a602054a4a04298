"""Optimizers and learning-rate schedules, as torch knows them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from gkd_dist.config import LrSchedule, TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the configuration; plain loops, so that results do not depend on fusing."""
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay, foreach=False)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, weight_decay=decay, foreach=False)


def moment_names(config: TrainConfig) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter, by torch's names; plain SGD keeps nothing."""
    if config.optimizer == "sgd":
        return ("momentum_buffer",) if config.momentum else ()
    return "exp_avg", "exp_avg_sq"


def lr_factor(schedule: LrSchedule, step: int, total_steps: int) -> float:
    """Factor of the learning rate in ``step`` (from 0) of ``total_steps``."""
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    span = max(1, total_steps - schedule.warmup)
    progress = min(1.0, (step - schedule.warmup) / span)
    if schedule.kind == "linear":
        return 1 - (1 - schedule.final) * progress
    if schedule.kind == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
