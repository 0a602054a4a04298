"""From the raw score of an edge to the argument of the softmax.

With sq = ‖z_i − z_j‖², L1 = Σ|z_i − z_j|:

==========  ===========  =======================  =====================
kernel      metric       outer_softmax=True       outer_softmax=False
==========  ===========  =======================  =====================
rbf         sqeuclidean  exp(−sq / (2 sigma))     −sq / (2 sigma)
euclidean   sqeuclidean  sq                       −sq / (2 sigma)
laplacian   manhattan    exp(−L1 / sigma)         −L1 / sigma
linear      dot          z_i · z_j                the same
poly        dot          (z_i · z_j + c)^degree   the same
cosine      cosine       cos(z_i, z_j)            the same
==========  ===========  =======================  =====================

The left column is the paper's softmax over kernel values (for rbf and laplacian bounded in (0, 1], so
that the loss of a node never exceeds about 0.4745); the right one an ordinary softmax of a similarity.
Either is divided by ``temperature``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from gkd_dist.config import KERNEL_METRICS
from gkd_dist.errors import ConfigError, DataError
from gkd_dist.losses.scores import Metric

KernelName = Literal["rbf", "euclidean", "laplacian", "linear", "poly", "cosine"]


@dataclass(frozen=True)
class Kernel:
    """A kernel without its width, which the two sides of a loss may have of their own."""

    name: KernelName = "rbf"
    outer_softmax: bool = True
    c: float = 0.0
    degree: int = 2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in KERNEL_METRICS:
            raise ConfigError(f"kernel {self.name!r} is unknown; use one of {', '.join(KERNEL_METRICS)}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature must be a positive number (got {self.temperature})")
        if self.degree < 1:
            raise ConfigError(f"degree must be at least 1 (got {self.degree})")

    @property
    def metric(self) -> Metric:
        """Metric of the scores the kernel is computed from."""
        return cast(Metric, KERNEL_METRICS[self.name])

    @property
    def uses_sigma(self) -> bool:
        """Whether the width changes anything."""
        return self.name in ("rbf", "laplacian") or (self.name == "euclidean" and not self.outer_softmax)

    def check_sigma(self, sigma: float | str) -> None:
        """Raises `ConfigError` unless ``sigma`` is a positive number, or "median" where there is a width."""
        if isinstance(sigma, str):
            if sigma != "median":
                raise ConfigError(f"sigma must be a positive number or 'median' (got {sigma!r})")
            if not self.uses_sigma:
                form = f"kernel {self.name} with outer_softmax: {str(self.outer_softmax).lower()}"
                raise ConfigError(f"sigma: median was asked for, but {form} has no width; remove sigma")
        elif not 0 < sigma < float("inf"):
            raise ConfigError(f"sigma must be a positive number or 'median' (got {sigma})")

    def sigma_from_median(self, median: float) -> float:
        """Width for which the median edge gets the softmax argument −1 (inside exp for the outer form).

        Half the median squared distance for rbf and euclidean, the median L1 distance for laplacian.
        Raises `DataError` for a median of 0.
        """
        if not median > 0:
            raise DataError(
                f"sigma: median needs a positive median score (got {median:g}): at least half of the edges join nodes "
                "with equal embeddings; give sigma a number"
            )
        return median / 2 if self.metric == "sqeuclidean" else median

    def logits(self, scores: Tensor, sigma: float) -> Tensor:
        """Argument of the softmax from raw ``scores`` [m]."""
        return self._similarity(scores, sigma) / self.temperature

    def _similarity(self, scores: Tensor, sigma: float) -> Tensor:
        if self.name == "poly":
            return (scores + self.c) ** self.degree
        if not self.uses_sigma:
            return scores
        exponent = scores / (-2 * sigma if self.metric == "sqeuclidean" else -sigma)
        return exponent.exp() if self.outer_softmax else exponent
