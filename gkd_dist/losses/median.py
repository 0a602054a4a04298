"""Median of scores that nobody holds all of: an integer histogram per part, summed, then read.

A float32 score is rounded to bfloat16, whose 65,536 bit patterns are mapped to keys in the order of
their values. Histograms of parts and ranks are summed as integers, so that the median depends neither
on how the graph was cut nor on who counted; its resolution is that of bfloat16 (relative 2⁻⁸).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dist.errors import DataError

NUM_KEYS = 1 << 16
_SIGN = 1 << 15


def score_histogram(scores: Tensor) -> Tensor:
    """How many of ``scores`` (floating point, any shape) have which key: int64 [65536]."""
    # Adding zero turns -0 into +0, which would otherwise have a key of its own.
    bits = (scores.detach().float().flatten() + 0.0).to(torch.bfloat16).view(torch.int16).int()
    # As integers, bit patterns ascend with positive values and descend with negative ones; negative
    # patterns read as int16 are negative already.
    keys = torch.where(bits >= 0, bits + _SIGN, -1 - bits)
    return torch.bincount(keys, minlength=NUM_KEYS)


def median_of_histogram(histogram: Tensor) -> float:
    """Lower median of the scores behind ``histogram`` int64 [65536].

    Raises `DataError` where there are no scores, or where the median is not finite.
    """
    total = int(histogram.sum())
    if total == 0:
        raise DataError("the median of no scores is asked for: no edge joins two different nodes; give sigma a number")
    key = int(torch.searchsorted(histogram.cumsum(0), (total + 1) // 2))
    median = _value_of_key(key)
    if median != median or abs(median) == float("inf"):
        raise DataError(f"the median of {total} scores is {median}; the embeddings they come from are not finite")
    return median


def _value_of_key(key: int) -> float:
    bits = key - _SIGN if key >= _SIGN else -1 - key
    return float(torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16))
