"""The largest logits: by hand, ties, moves, and several parts as one."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from gkd_dist.errors import DataError
from gkd_dist.topk import TopK, concatenate, top_k

LOGITS = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])


def test_by_hand() -> None:
    brief = top_k(LOGITS, 2, [1.0, 2.0])
    assert brief.values.tolist() == [[4.0, 3.0], [0.0, 0.0]]
    assert brief.index.tolist() == [[1, 3], [0, 1]]  # of equal ones the smaller class, as arg-max does
    assert brief.index.dtype == torch.int16
    assert brief.tail[0].tolist() == pytest.approx([log(exp(1) + exp(2)), log(exp(0.5) + exp(1))])
    assert brief.tail_at(2.0)[1].item() == pytest.approx(log(2))


def test_many_classes_have_wider_indices() -> None:
    logits = torch.zeros(3, 40_000)
    logits[1, 39_999] = 5.0
    brief = top_k(logits, 1, [])
    assert brief.index.dtype == torch.int32
    assert brief.index.flatten().tolist() == [0, 39_999, 0]
    assert brief.tail.shape == (3, 0)


def test_a_large_matrix_goes_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    whole = top_k(logits, 3, [0.5])
    monkeypatch.setattr("gkd_dist.topk._CHUNK_VALUES", 15)
    chunked = top_k(logits, 3, [0.5])
    for name in ("values", "index", "tail"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name))


@pytest.mark.parametrize("k", [0, 4, 5])
def test_all_or_nothing_is_no_top(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 3"):
        top_k(LOGITS, k, [])


def test_an_unknown_temperature_is_named() -> None:
    with pytest.raises(DataError, match=r"no tail at temperature 3 \(they have 1, 2\); run `gkd infer`"):
        top_k(LOGITS, 2, [1.0, 2.0]).tail_at(3.0)


def test_parts_one_after_the_other() -> None:
    whole = top_k(LOGITS, 2, [1.0])
    both = concatenate([top_k(LOGITS[:1], 2, [1.0]), top_k(LOGITS[1:], 2, [1.0])])
    assert isinstance(both, TopK)
    assert torch.equal(both.values, whole.values)
    assert torch.equal(both.index, whole.index)
    assert torch.equal(both.tail, whole.tail)
    assert (both.num_nodes, both.num_classes) == (2, 4)
    assert torch.equal(concatenate([LOGITS, LOGITS]), LOGITS.repeat(2, 1))  # type: ignore[arg-type]
    assert both.to("cpu").temperatures == (1.0,)
