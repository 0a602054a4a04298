"""What storing a score coarsely can do to the loss: bounds, from one number that was measured.

A score that is off by at most e moves the argument of the softmax by at most δ = `argument_error`.
For p = softmax(a), p' = softmax(a') with |a − a'| ≤ δ, both directions of the divergence obey

    KL(p || p'), KL(p' || p) ≤ min(δ² / 2, 2 δ)

and the loss of a student with arguments b against p' instead of p is off by at most

    KL(student || teacher)   2 δ                  whatever the student
    KL(teacher || student)   δ (gap + δ) / 2      gap = largest − smallest a_j − b_j of a neighbourhood

They hold for every subset of the neighbours. docs/knowledge.md has the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gkd_dist.config import Loss, LspLoss, resolve_layer
from gkd_dist.errors import DataError
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.lsp import Direction


class ScoreError(NamedTuple):
    """Scores lie in ``low`` to ``high``; stored, they are off by at most ``error``."""

    error: float
    low: float
    high: float


def argument_error(kernel: Kernel, sigma: float, score: ScoreError) -> float:
    """Largest error of the softmax argument of ``kernel`` over stored ``score``; may be infinite."""
    if score.error == 0:
        return 0.0
    return _similarity_error(kernel, sigma, score) / kernel.temperature


def _similarity_error(kernel: Kernel, sigma: float, score: ScoreError) -> float:
    if kernel.name == "poly":
        largest = max(abs(score.low - score.error + kernel.c), abs(score.high + score.error + kernel.c))
        try:
            return float(kernel.degree * largest ** (kernel.degree - 1) * score.error)
        except OverflowError:
            return math.inf
    if not kernel.uses_sigma:
        return score.error
    width = 2 * sigma if kernel.metric == "sqeuclidean" else sigma
    exponent = score.error / width
    if not kernel.outer_softmax:
        return exponent
    # exp falls, and ever more slowly: no two values differ more than those nearest to the smallest distance
    nearest = max(0.0, score.low - score.error) / width
    return math.exp(-nearest) * -math.expm1(-exponent)


def kl_bound(argument: float) -> float:
    """Largest KL divergence, in either direction, of local structures whose arguments are off by ``argument``."""
    return min(argument * argument / 2, 2 * argument)


def argument_gap(kernel: Kernel) -> float:
    """Largest difference between two a_j − b_j of a neighbourhood, for any teacher and student; may be infinite."""
    if kernel.uses_sigma and kernel.outer_softmax:  # arguments in (0, 1]
        return 2 / kernel.temperature
    return 4 / kernel.temperature if kernel.name == "cosine" else math.inf


def lsp_bound(direction: Direction, argument: float, gap: float) -> float:
    """Largest error of a node's loss, and so of the mean; ``gap`` as in `argument_gap`."""
    if argument == 0:
        return 0.0
    return 2 * argument if direction == "student||teacher" else argument * (gap + argument) / 2


@dataclass(frozen=True)
class ScoreReader:
    """A loss term that reads stored scores: which, and through which kernel on the teacher's side."""

    name: str
    layer: int
    kernel: Kernel
    sigma: float | str
    direction: Direction

    @property
    def score(self) -> tuple[int, str]:
        """(positive teacher layer, metric)."""
        return self.layer, self.kernel.metric

    def width(self, median: float | None) -> float | None:
        """Sigma, from ``median`` where it is that; None where it is not known or is 0."""
        if not isinstance(self.sigma, str):
            return self.sigma
        return self.kernel.sigma_from_median(median) if median else None

    def kl(self, score: ScoreError, median: float | None = None) -> float | None:
        """KL bound of this term; None where its width is not known yet."""
        sigma = self.width(median)
        return None if sigma is None else kl_bound(argument_error(self.kernel, sigma, score))


def score_readers(losses: Sequence[Loss], teacher_layers: int) -> tuple[ScoreReader, ...]:
    """The terms of a configuration that read scores, under the names they have in an objective."""
    readers = []
    for name, loss in named_losses(losses):
        if isinstance(loss, LspLoss):
            kernel = Kernel(loss.kernel, loss.outer_softmax, loss.c, loss.degree, loss.temperature)
            sigma = loss.sigma if loss.teacher_sigma is None else loss.teacher_sigma
            layer = resolve_layer(loss.teacher_layer, teacher_layers)
            readers.append(ScoreReader(name, layer, kernel, sigma, loss.direction))
    return tuple(readers)


def describe(reader: ScoreReader, score: ScoreError, median: float | None) -> dict[str, Any]:
    """What a manifest says of one term, as JSON values: null where there is no finite bound."""
    sigma = reader.width(median)
    argument = math.inf if sigma is None else argument_error(reader.kernel, sigma, score)
    return {
        "loss": reader.name,
        "score": f"{reader.layer}.{reader.kernel.metric}",
        "kernel": reader.kernel.name,
        "outer_softmax": reader.kernel.outer_softmax,
        "temperature": reader.kernel.temperature,
        "direction": reader.direction,
        "sigma": sigma if reader.kernel.uses_sigma else None,
        "argument_bound": _finite(argument),
        "kl_bound": _finite(kl_bound(argument)),
        "lsp_bound": _finite(lsp_bound(reader.direction, argument, argument_gap(reader.kernel))),
    }


def require_fine(
    readers: Sequence[ScoreReader],
    scores: Mapping[tuple[int, str], ScoreError],
    medians: Mapping[tuple[int, str], float | None],
    max_kl: float | None,
    dtype: str,
    where: str,
) -> None:
    """`DataError` where a term of known width could be off by more than ``max_kl``; None: nothing is refused.

    ``dtype`` is that of the stored scores and ``where`` says whose they are.
    """
    if max_kl is None:
        return
    for reader in readers:
        kl = reader.kl(scores[reader.score], medians.get(reader.score)) if reader.score in scores else None
        if kl is not None and not kl <= max_kl:
            layer, metric = reader.score
            raise DataError(
                f"scores.{layer}.{metric} of {where} as {dtype} are off by up to {scores[reader.score].error:.3g}, so "
                f"that KL(teacher || stored teacher) of loss {reader.name} is only known to be below {kl:.3g}, above "
                f"infer.max_kl {max_kl:g}; {_remedy(dtype)} and run the same command again"
            )


def _remedy(dtype: str) -> str:
    finer = {"uint8": "fp16", "bf16": "fp16", "fp16": "fp32"}.get(dtype)
    return "raise infer.max_kl" if finer is None else f"set infer.scores_dtype={finer} or raise infer.max_kl"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def named_losses(losses: Sequence[Loss]) -> list[tuple[str, Loss]]:
    """Every loss with the name that its term has."""
    return list(zip(term_names(losses), losses, strict=True))


def term_names(losses: Sequence[Loss]) -> list[str]:
    """Unique names of terms: the first of a kind is named after it, others get ``_1``, ``_2``."""
    seen: dict[str, int] = {}
    names = []
    for loss in losses:
        count = seen.get(loss.kind, 0)
        names.append(loss.kind if not count else f"{loss.kind}_{count}")
        seen[loss.kind] = count + 1
    return names
