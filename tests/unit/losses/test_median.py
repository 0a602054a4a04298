"""Medians from summed histograms: keys in the order of values, exactness, independence of the cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import DataError
from gkd_dist.losses.median import NUM_KEYS, median_of_histogram, score_histogram

scores = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=60)


def median(values: list[float] | torch.Tensor) -> float:
    return median_of_histogram(score_histogram(torch.as_tensor(values)))


def test_lower_median_by_hand() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.0
    assert median([-1.0, -8.0, 5.0]) == -1.0
    assert median([7.0]) == 7.0


def test_a_histogram_counts_every_score_once() -> None:
    histogram = score_histogram(torch.randn(5, 7))
    assert histogram.shape == (NUM_KEYS,)
    assert histogram.dtype == torch.int64
    assert histogram.sum() == 35


def test_keys_keep_the_order_of_every_bfloat16() -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[torch.isfinite(values)].sort().values
    keys = torch.stack([score_histogram(v).argmax() for v in values[::97]])
    assert (keys[1:] > keys[:-1]).all()


def test_both_zeros_are_one_value() -> None:
    assert torch.equal(score_histogram(torch.tensor([-0.0])), score_histogram(torch.tensor([0.0])))


@given(scores)
@settings(max_examples=100, deadline=None)
def test_equals_the_median_of_the_rounded_scores(values: list[float]) -> None:
    assert median(values) == torch.tensor(values).bfloat16().float().median().item()


@given(scores, st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_does_not_depend_on_the_cut(values: list[float], num_parts: int) -> None:
    parts = [score_histogram(torch.tensor(values[i::num_parts])) for i in range(num_parts)]
    assert median_of_histogram(torch.stack(parts).sum(0)) == median(values)


def test_no_scores_and_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(DataError, match="no edge joins two different nodes"):
        median(torch.zeros(0))
    with pytest.raises(DataError, match="median of 1 scores is nan"):
        median([float("nan")])
    with pytest.raises(DataError, match="median of 3 scores is inf"):
        median([float("inf"), 1.0, float("inf")])
