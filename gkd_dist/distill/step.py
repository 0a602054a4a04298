"""One optimizer step: reads like the equation.

For terms k with weights w_k, the objective is ``sum_k w_k * (sum over all units of S_k) / (sum over
all units of C_k)``: sums and counts are local, the division is by what the whole world saw, so the
value depends neither on how the graph was cut nor on who does the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gkd_dist.distill.gradients import gradient_squares
from gkd_dist.distill.wishes import NUM_WISHES, Agreed
from gkd_dist.errors import NonFiniteLossError
from gkd_dist.graph import Batch
from gkd_dist.losses.objective import Objective
from gkd_dist.losses.terms import Output
from gkd_dist.sampling import Sampler
from gkd_dist.stream.order import hash_of
from gkd_dist.world import World


class Engine(Protocol):
    """What a step needs of an optimizer engine; gradients of ranks are averaged by it."""

    def forward(self, batch: Batch, outputs: Sequence[Output]) -> tuple[Tensor, dict[Output, Tensor]]:
        """Logits and further ``outputs`` of the student: its layers, and heads of loss terms."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of ``loss``; ``last`` marks the end of the step."""

    def step(self) -> None:
        """Updates the parameters once."""


@dataclass(frozen=True)
class StepReport:
    """Global sums [k] and counts [k] of a step, float64 on the CPU.

    ``grad_squares`` [k], where they were asked for: of the sums' gradients with respect to the outputs.
    """

    sums: Tensor
    counts: Tensor
    weights: Tensor
    agreed: Agreed
    grad_squares: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """Value of each term, [k]."""
        return self.sums / self.counts.clamp_min(1)

    @property
    def total(self) -> float:
        """Value of the objective."""
        return float((self.weights * self.means).sum())

    def grad_norms(self, names: Sequence[str]) -> dict[str, float]:
        """Gradient norm of each term of the objective that is on, by name; empty where not asked for."""
        if self.grad_squares is None:
            return {}
        norms = self.weights / self.counts.clamp_min(1) * self.grad_squares.sqrt()
        on = zip(names, norms.tolist(), (self.weights * self.counts).tolist(), strict=True)
        return {name: norm for name, norm, weight in on if weight > 0}


@contextlib.contextmanager
def seeded(device: torch.device, *counters: int) -> Iterator[None]:
    """Random numbers inside depend on ``counters`` alone, not on the process or on what ran before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: without CUDA it formats the call stack each time, which takes longer than a small layer
        torch.default_generator.manual_seed(hash_of(*counters))
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(hash_of(*counters))
        yield


def train_step(
    engine: Engine,
    objective: Objective,
    batches: Sequence[Batch],
    world: World,
    *,
    seed: int,
    epoch: int,
    step: int,
    wishes: Tensor | None = None,
    sampler: Sampler | None = None,
    measure_gradients: bool = False,
) -> StepReport:
    """One optimizer step over this rank's ``batches``, which every rank has equally many of.

    ``wishes`` [3] of this rank are summed with the counts; the report says what all ranks want. ``sampler``
    chooses the neighbours that layers look at (None: all).
    Raises `NonFiniteLossError` on every rank at once, before the optimizer saw the loss.
    """
    batches = [batch.with_noise(hash_of(seed, step)) for batch in batches]
    counts = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    own = torch.zeros(NUM_WISHES, dtype=torch.float64) if wishes is None else wishes
    counts, wanted = world.sum(torch.cat([counts.double().cpu(), own])).tensor_split([len(counts)])
    weights = objective.weights(epoch).double()
    scale = (weights / counts.clamp_min(1)).float()
    totals = torch.zeros(2, len(counts), dtype=torch.float64)  # sums, and squares of gradients
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        world.place.unit = batch.unit
        with seeded(world.device, seed, step, batch.unit):
            sampled = batch if sampler is None else sampler.sample(batch, objective.nodes(batch), draws=objective.draws)
            logits, layers = engine.forward(sampled, objective.outputs)
        sums = objective.sums(batch, logits, layers, epoch)
        totals[0] += sums.detach().double().cpu()
        if measure_gradients:
            totals[1] += gradient_squares(objective, batch, logits, layers, epoch)
        if last:
            totals = world.sum(totals)
            _check_finite(totals[0], objective.names, epoch, step)
        # The engine averages gradients over ranks; the loss is already divided by the global
        # count, so that average is undone here.
        engine.backward((scale.to(sums.device) * sums).sum() * world.world_size, last=last)
    engine.step()
    return StepReport(totals[0], counts, weights, Agreed.of(wanted), totals[1] if measure_gradients else None)


def _check_finite(totals: Tensor, names: Sequence[str], epoch: int, step: int) -> None:
    if bool(torch.isfinite(totals).all()):
        return
    bad = [name for name, value in zip(names, totals.tolist(), strict=True) if not abs(value) < float("inf")]
    raise NonFiniteLossError(
        f"loss {', '.join(bad)} is not finite in epoch {epoch}, step {step}; lower distill.lr, set distill.grad_clip, "
        "or widen sigma"
    )
