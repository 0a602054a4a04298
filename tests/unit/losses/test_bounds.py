"""What a measured error of scores means for local structures, against what really happens."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd_dist.config import KERNEL_METRICS, KdLoss, LabelLoss, LspLoss
from gkd_dist.errors import DataError
from gkd_dist.losses.bounds import (
    ScoreError,
    argument_error,
    argument_gap,
    describe,
    kl_bound,
    lsp_bound,
    require_fine,
    score_readers,
    term_names,
)
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.lsp import Direction
from gkd_dist.shards.quantise import DTYPES, pack_float, pack_rows, unpack_float, unpack_rows
from gkd_dist.sparse import indptr_from_counts, row_index, segment_log_softmax, segment_max, segment_sum

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SLACK = 1e-9  # rounding of float64 arithmetic on numbers up to some thousands


def stored(scores: Tensor, indptr: Tensor, dtype: str) -> tuple[Tensor, ScoreError]:
    """``scores`` after a round through storage, and what is known of the error."""
    if dtype == "uint8":
        codes, offset, scale, info = pack_rows(scores, indptr)
        back = unpack_rows(codes, offset, scale, indptr)
    else:
        values, info = pack_float(scores, dtype)
        back = unpack_float(values, info)
    return back, ScoreError(info["bound"], float(scores.min()), float(scores.max()))


def kl(p: Tensor, q: Tensor, indptr: Tensor) -> Tensor:
    """KL divergence per node of two softmax arguments [m], float64 [n]."""
    log_p, log_q = segment_log_softmax(p, indptr), segment_log_softmax(q, indptr)
    return segment_sum(log_p.exp() * (log_p - log_q), indptr)


def gap(teacher: Tensor, student: Tensor, indptr: Tensor) -> Tensor:
    """Largest minus smallest difference of the arguments in each neighbourhood [n]."""
    difference = teacher - student
    return segment_max(difference, indptr) + segment_max(-difference, indptr)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Kernel, float, str]:
    """(row starts, teacher scores float32, student scores, kernel, sigma, dtype)."""
    name = draw(st.sampled_from(sorted(KERNEL_METRICS)))
    kernel = Kernel(
        name,  # type: ignore[arg-type]
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 1.0, -2.0])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0.25, 1.0, 4.0])),
    )
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = sum(counts)
    reach = draw(st.sampled_from([0.01, 1.0, 30.0])) if kernel.metric != "cosine" else 1.0
    both = [(torch.rand(size, generator=random) * 2 - 1) * reach for _ in range(2)]
    if kernel.metric in ("sqeuclidean", "manhattan"):
        both = [scores.abs() for scores in both]
    sigma = draw(st.sampled_from([0.05, 1.0, 40.0]))
    dtype = draw(st.sampled_from([*sorted(DTYPES), "uint8"]))
    return indptr_from_counts(torch.tensor(counts)), both[0], both[1].double(), kernel, sigma, dtype


@settings(max_examples=500, deadline=None)
@given(cases())
def test_the_bounds_hold_in_both_directions_and_on_any_subset(
    case: tuple[Tensor, Tensor, Tensor, Kernel, float, str],
) -> None:
    indptr, scores, student_scores, kernel, sigma, dtype = case
    back, error = stored(scores, indptr, dtype)
    exact, coarse = kernel.logits(scores.double(), sigma), kernel.logits(back.double(), sigma)
    student = kernel.logits(student_scores, sigma)
    delta = argument_error(kernel, sigma, error)
    slack = SLACK * (1 + float(exact.abs().max()))
    assert float((exact - coarse).abs().max()) <= delta + slack
    # a subset of the neighbours, such as a fan-out draws: every other one, at least one per node
    keep = (torch.arange(scores.numel()) - indptr[row_index(indptr)]) % 2 == 0
    some = indptr_from_counts((indptr.diff() + 1) // 2)
    for rows, t, q, s in ((indptr, exact, coarse, student), (some, exact[keep], coarse[keep], student[keep])):
        assert float(kl(t, q, rows).max()) <= kl_bound(delta) + slack
        assert float(kl(q, t, rows).max()) <= kl_bound(delta) + slack
        off = (kl(s, t, rows) - kl(s, q, rows)).abs()
        assert float(off.max()) <= lsp_bound("student||teacher", delta, math.inf) + slack
        off, gaps = (kl(t, s, rows) - kl(q, s, rows)).abs(), gap(t, s, rows)
        assert bool((off <= delta * (gaps + delta) / 2 + slack).all())
        assert float(off.max()) <= lsp_bound("teacher||student", delta, float(gaps.max())) + slack
        assert float(gaps.max()) <= argument_gap(kernel) + slack


def test_twice_the_error_is_no_bound_where_the_student_may_be_anywhere() -> None:
    """Why KL(teacher || student) has the gap in its bound."""
    indptr, delta = torch.tensor([0, 2]), 0.1
    teacher = torch.tensor([0.0, 0.0], dtype=torch.float64)
    coarse = teacher + torch.tensor([delta, -delta])
    student = torch.tensor([30.0, 0.0], dtype=torch.float64)
    off = float((kl(teacher, student, indptr) - kl(coarse, student, indptr)).abs())
    assert off > 2 * delta * 7
    assert off <= lsp_bound("teacher||student", delta, 30.0)
    off = float((kl(student, teacher, indptr) - kl(student, coarse, indptr)).abs())
    assert off <= lsp_bound("student||teacher", delta, 30.0)


def test_the_divergence_bound_is_nearly_reached() -> None:
    """Two neighbours, one pushed up and the other down: nothing smaller than δ²/2 would do."""
    indptr, delta = torch.tensor([0, 2]), 0.01
    teacher = torch.zeros(2, dtype=torch.float64)
    coarse = torch.tensor([delta, -delta], dtype=torch.float64)
    for pair in ((teacher, coarse), (coarse, teacher)):
        assert 0.999 * kl_bound(delta) < float(kl(*pair, indptr)) <= kl_bound(delta)


@pytest.mark.parametrize(
    ("kernel", "sigma", "expected"),
    [
        (Kernel("rbf", outer_softmax=False), 4.0, 0.5 / 8),
        (Kernel("rbf", outer_softmax=False, temperature=0.5), 4.0, 0.5 / 4),
        (Kernel("euclidean", outer_softmax=False), 4.0, 0.5 / 8),
        (Kernel("euclidean", outer_softmax=True), 4.0, 0.5),  # the score itself
        (Kernel("laplacian", outer_softmax=False), 4.0, 0.5 / 4),
        (Kernel("linear"), 4.0, 0.5),
        (Kernel("cosine"), 4.0, 0.5),
        (Kernel("rbf", outer_softmax=True), 4.0, math.exp(-0.5 / 8) * (1 - math.exp(-0.5 / 8))),
        (Kernel("laplacian", outer_softmax=True), 4.0, math.exp(-0.5 / 4) * (1 - math.exp(-0.5 / 4))),
        (Kernel("poly", c=-1.0, degree=2), 4.0, 2 * (3.5 - 1) * 0.5),
        (Kernel("poly", c=2.0, degree=3), 4.0, 3 * 5.5**2 * 0.5),
    ],
)
def test_errors_of_arguments_by_hand(kernel: Kernel, sigma: float, expected: float) -> None:
    assert argument_error(kernel, sigma, ScoreError(0.5, 1.0, 3.0)) == pytest.approx(expected, rel=1e-12)


def test_exact_scores_have_no_error_and_overflow_is_infinite() -> None:
    poly = Kernel("poly", degree=9)
    assert argument_error(poly, 1.0, ScoreError(0.0, -math.inf, math.inf)) == 0
    assert argument_error(poly, 1.0, ScoreError(1.0, 0.0, 1e300)) == math.inf
    assert argument_error(Kernel("rbf", outer_softmax=False), 1e-300, ScoreError(1e30, 0, 1)) == math.inf
    assert argument_error(Kernel("rbf"), 1e-300, ScoreError(1e30, 0, 1)) == 1.0  # kernel values lie in (0, 1]
    assert lsp_bound("teacher||student", 0.0, math.inf) == 0


LOSSES = (
    LabelLoss(kind="label"),
    LspLoss(kind="lsp", sigma=2.0, outer_softmax=False),
    KdLoss(kind="kd"),
    LspLoss(kind="lsp", sigma=1.0, teacher_sigma="median", outer_softmax=False, direction="teacher||student"),
)


def test_terms_that_read_scores() -> None:
    assert term_names(LOSSES) == ["label", "lsp", "kd", "lsp_1"]
    first, second = score_readers(LOSSES, teacher_layers=3)
    assert (first.name, first.score, first.width(None)) == ("lsp", (2, "sqeuclidean"), 2.0)
    assert (second.name, second.width(None), second.width(0.0), second.width(6.0)) == ("lsp_1", None, None, 3.0)


def test_what_a_manifest_says() -> None:
    first, second = score_readers(LOSSES, teacher_layers=3)
    error = ScoreError(0.4, 0.0, 9.0)
    assert describe(first, error, None) == {
        "loss": "lsp",
        "score": "2.sqeuclidean",
        "kernel": "rbf",
        "outer_softmax": False,
        "temperature": 1.0,
        "direction": "student||teacher",
        "sigma": 2.0,
        "argument_bound": pytest.approx(0.1),
        "kl_bound": pytest.approx(0.005),
        "lsp_bound": pytest.approx(0.2),
    }
    unknown = describe(second, error, None)
    assert [unknown[key] for key in ("sigma", "argument_bound", "kl_bound", "lsp_bound")] == [None] * 4
    known = describe(second, error, 2.0)
    assert (known["sigma"], known["argument_bound"], known["lsp_bound"]) == (1.0, pytest.approx(0.2), None)


def test_too_coarse_scores_are_refused_with_the_remedy() -> None:
    readers = score_readers(LOSSES, teacher_layers=3)
    errors = {(2, "sqeuclidean"): ScoreError(0.4, 0.0, 9.0)}
    require_fine(readers, errors, {}, 0.005 + 1e-12, "uint8", "part 3")
    require_fine(readers, errors, {}, None, "uint8", "part 3")
    with pytest.raises(
        DataError,
        match=r"scores\.2\.sqeuclidean of part 3 as uint8 .* loss lsp .* below 0\.005, above infer\.max_kl 0\.001; "
        r"set infer\.scores_dtype=fp16 or raise",
    ):
        require_fine(readers, errors, {}, 0.001, "uint8", "part 3")
    with pytest.raises(DataError, match=r"loss lsp_1 .* set infer\.scores_dtype=fp32"):
        require_fine(readers, errors, {(2, "sqeuclidean"): 2.0}, 0.01, "fp16", "part 3")
