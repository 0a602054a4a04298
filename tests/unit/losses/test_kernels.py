"""Kernels against their formulas at one score."""

from __future__ import annotations

from math import exp

import pytest
import torch

from gkd_dist.config import KERNEL_METRICS
from gkd_dist.errors import ConfigError, DataError
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.scores import METRICS


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Kernel("rbf"), exp(-6 / 4)),
        (Kernel("rbf", outer_softmax=False), -6 / 4),
        (Kernel("euclidean"), 6.0),
        (Kernel("euclidean", outer_softmax=False), -6 / 4),
        (Kernel("laplacian"), exp(-6 / 2)),
        (Kernel("laplacian", outer_softmax=False), -6 / 2),
        (Kernel("linear"), 6.0),
        (Kernel("linear", outer_softmax=False), 6.0),
        (Kernel("poly"), 36.0),
        (Kernel("poly", c=-1.0, degree=3), 125.0),
        (Kernel("cosine"), 6.0),
        (Kernel("cosine", temperature=0.1), 60.0),
    ],
)
def test_logit_of_score_6_with_sigma_2(kernel: Kernel, expected: float) -> None:
    logits = kernel.logits(torch.tensor([6.0], dtype=torch.float64), sigma=2.0)
    torch.testing.assert_close(logits, torch.tensor([expected], dtype=torch.float64))


def test_metrics_are_those_of_the_configuration() -> None:
    for name, metric in KERNEL_METRICS.items():
        assert Kernel(name).metric == metric  # type: ignore[arg-type]
    assert set(KERNEL_METRICS.values()) == set(METRICS)


@pytest.mark.parametrize("name", ["rbf", "laplacian"])
def test_the_median_edge_gets_the_argument_minus_one(name: str) -> None:
    kernel = Kernel(name, outer_softmax=False)  # type: ignore[arg-type]
    sigma = kernel.sigma_from_median(3.0)
    assert sigma == {"rbf": 1.5, "laplacian": 3.0}[name]
    assert kernel.logits(torch.tensor([3.0]), sigma).item() == -1.0


def test_a_median_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match=r"positive median score \(got 0\).*give sigma a number"):
        Kernel("rbf").sigma_from_median(0.0)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="kernel 'gauss' is unknown; use one of rbf, euclidean"):
        Kernel("gauss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature must be a positive number"):
        Kernel(temperature=0.0)
    with pytest.raises(ConfigError, match="degree must be at least 1"):
        Kernel("poly", degree=0)
    with pytest.raises(ConfigError, match=r"sigma must be a positive number or 'median' \(got -1\)"):
        Kernel().check_sigma(-1)
    with pytest.raises(ConfigError, match="kernel linear with outer_softmax: true has no width"):
        Kernel("linear").check_sigma("median")
    with pytest.raises(ConfigError, match="kernel euclidean with outer_softmax: true has no width"):
        Kernel("euclidean").check_sigma("median")
