"""A pass over all units in evaluation mode: metrics per split, or the student's own medians.

Counts are integers summed over ranks, so they do not depend on who looked at which unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gkd_dist.distill.step import Engine
from gkd_dist.graph import SPLITS, Batch, Task
from gkd_dist.losses.objective import Objective
from gkd_dist.metrics import NUM_COUNTS, metric_of, predicted_labels, split_counts
from gkd_dist.world import World

Metrics = dict[str, float | None]  # accuracy or micro-F1 per split, None without labels


def _rounds(batches: Iterable[Batch], rounds: int, empty: Batch) -> Iterator[Batch]:
    """Exactly ``rounds`` batches on every rank, ``empty`` ones where a rank has fewer units."""
    source = iter(batches)
    for _ in range(rounds):
        yield next(source, empty)


@torch.no_grad()
def validate(engine: Engine, batches: Iterable[Batch], rounds: int, empty: Batch, world: World, task: Task) -> Metrics:
    """Metrics over the owned nodes of all ranks' batches."""
    counts = torch.zeros(len(SPLITS), NUM_COUNTS, dtype=torch.int64)
    for batch in _rounds(batches, rounds, empty):
        logits, _ = engine.forward(batch, ())
        predicted = predicted_labels(logits[: batch.num_owned], task)
        counts += torch.stack([split_counts(predicted, batch.y, batch.mask(split)) for split in SPLITS]).cpu()
    counts = world.sum(counts)
    return {split: metric_of(counts[index]) for index, split in enumerate(SPLITS)}


@torch.no_grad()
def measure_medians(
    engine: Engine, objective: Objective, batches: Iterable[Batch], rounds: int, empty: Batch, world: World
) -> None:
    """Fixes the widths of terms that ask for the student's own median."""
    layers = sorted({layer for _, layer, _ in objective.needs_student_median})
    total: Tensor | None = None
    for batch in _rounds(batches, rounds, empty):
        _, hidden = engine.forward(batch, layers)
        histograms = objective.student_histograms(batch, hidden).cpu()
        total = histograms if total is None else total + histograms
    assert total is not None
    objective.set_student_medians(world.sum(total))
