"""Names inside a knowledge store and medians merged from parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.infer.knowledge import Histogram, add_histogram, embedding_name, median_score, score_histogram, score_name


def test_names() -> None:
    assert score_name(2, "dot") == "scores.2.dot"
    assert embedding_name(1) == "embeddings.1"


def test_median_by_hand() -> None:
    scores, loops = torch.tensor([4.0, 1.0, 99.0, 2.0, 3.0]), torch.tensor([False, False, True, False, False])
    assert median_score(score_histogram(scores, loops)) == 2.0


def test_no_scores_have_no_median() -> None:
    loops_only = score_histogram(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    assert loops_only == {}
    assert median_score(loops_only) is None


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_median_does_not_depend_on_how_scores_are_split(values: list[float], num_parts: int) -> None:
    scores = torch.tensor(values)
    merged: Histogram = {}
    for part in scores.chunk(num_parts):
        add_histogram(merged, score_histogram(part, torch.zeros(part.numel(), dtype=torch.bool)))
    rounded = scores.bfloat16().float().sort().values
    assert median_score(merged) == pytest.approx(float(rounded[(len(values) - 1) // 2]), abs=0)
