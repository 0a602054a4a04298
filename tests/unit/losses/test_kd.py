"""Soft-label distillation: a small answer by hand, scale, selection, gradients."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import ConfigError, DataError, GraphError
from gkd_dist.losses import kd_loss
from gkd_dist.topk import top_k

TASKS = ("multiclass", "multilabel")


def case(nodes: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, nodes, classes, dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher


def test_multiclass_by_hand() -> None:
    # Teacher (3/4, 1/4) against student (1/2, 1/2).
    loss = kd_loss(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[log(3.0), 0.0]], dtype=torch.float64))
    assert loss.item() == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))


def test_temperature_scales_logits_and_restores_the_gradient() -> None:
    # Logits 2·log 3 at T = 2 are those of the test above; the loss is multiplied by T².
    student = torch.zeros(1, 2, dtype=torch.float64)
    loss = kd_loss(student, torch.tensor([[2 * log(3.0), 0.0]], dtype=torch.float64), temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.75 * log(1.5) + 0.25 * log(0.5)))


def test_multilabel_is_the_mean_of_binary_divergences() -> None:
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[log(3.0), 0.0]], dtype=torch.float64)
    expected = (0.75 * log(1.5) + 0.25 * log(0.5)) / 2  # the second label agrees
    assert kd_loss(student, teacher, task="multilabel").item() == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS)
def test_zero_where_student_and_teacher_agree_and_positive_otherwise(task: str) -> None:
    student, teacher = case()
    assert kd_loss(teacher, teacher, task=task).item() == pytest.approx(0, abs=1e-12)
    assert kd_loss(student, teacher, task=task) > 0.01


@pytest.mark.parametrize("task", TASKS)
def test_scale_depends_neither_on_the_number_of_nodes_nor_of_labels(task: str) -> None:
    student, teacher = case()
    loss = kd_loss(student, teacher, temperature=3.0, task=task)
    twice = kd_loss(student.repeat(2, 1), teacher.repeat(2, 1), temperature=3.0, task=task)
    assert abs(loss - twice) < 1e-12
    if task == "multilabel":
        wide = kd_loss(student.repeat(1, 3), teacher.repeat(1, 3), temperature=3.0, task=task)
        assert abs(loss - wide) < 1e-12


def test_gradient_at_high_temperature_tends_to_that_of_matching_logits() -> None:
    # For T → ∞ the gradient of T² KL is (s − t, both centred) / c: it does not vanish with T.
    student, teacher = case()
    (grad,) = torch.autograd.grad(kd_loss(student, teacher, temperature=1e4), student)
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(grad, gap.detach() / 4 / 6, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_gradcheck(task: str) -> None:
    student, teacher = case(3, 3)
    selected = torch.tensor([True, False, True])
    check = lambda s: kd_loss(s, teacher, temperature=2.0, selected=selected, task=task)  # noqa: E731
    assert torch.autograd.gradcheck(check, (student,))


def test_only_selected_nodes_count() -> None:
    student, teacher = case()
    selected = torch.tensor([True, False, True, False, False, False])
    torch.testing.assert_close(
        kd_loss(student, teacher, selected=selected), kd_loss(student[selected], teacher[selected])
    )
    nobody = kd_loss(student, teacher, selected=torch.zeros(6, dtype=torch.bool))
    nobody.backward()
    assert nobody.item() == 0
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


@pytest.mark.parametrize("task", TASKS)
def test_extreme_logits_stay_finite(task: str) -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-1e4, 1e4]]), task=task)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_wrong_input_is_named() -> None:
    student, teacher = case()
    with pytest.raises(ConfigError, match="temperature must be a positive number"):
        kd_loss(student, teacher, temperature=0)
    with pytest.raises(ConfigError, match="task must be multiclass or multilabel"):
        kd_loss(student, teacher, task="regression")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"one shape \[k, c\]"):
        kd_loss(student, teacher[:2])


# --- of a teacher's largest logits -----------------------------------------------------------


def test_top_k_by_hand() -> None:
    # Teacher (1/2, 1/4, 1/4) kept as (1/2, others 1/2), against a uniform student (1/3, others 2/3).
    teacher = top_k(torch.tensor([[log(2.0), 0.0, 0.0]]), 1, [1.0])
    loss = kd_loss(torch.zeros(1, 3), teacher)
    assert loss.item() == pytest.approx(0.5 * log(3 / 2) + 0.5 * log(3 / 4))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.1, 3.0, 30.0]))
def test_top_k_is_a_divergence_below_the_full_one(seed: int, classes: int, temperature: float, reach: float) -> None:
    """Merging outcomes loses information, ever less of it the more are kept."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, classes, dtype=torch.float64, generator=draw) * reach
    full = kd_loss(student, teacher, temperature=temperature).item()
    before = 0.0
    for k in range(1, classes):
        merged = kd_loss(student, top_k(teacher, k, [temperature]), temperature=temperature).item()
        slack = 1e-5 * (1 + full)  # values and tail are float32
        assert before - slack <= merged <= full + slack
        before = merged
    if classes > 1:  # all but one kept: the others are that one, and nothing is lost
        assert before == pytest.approx(full, rel=1e-5, abs=1e-5)


def test_top_k_gradient_is_that_of_the_merged_outcomes() -> None:
    student, teacher = case(classes=5)
    brief = top_k(teacher, 2, [2.0])
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, brief, temperature=2.0), student)
    same = teacher.float().double().clone().requires_grad_()
    kd_loss(same, brief, temperature=2.0).backward()
    assert float(same.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


def test_top_k_of_a_student_that_is_certain_stays_finite() -> None:
    student = torch.tensor([[500.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = kd_loss(student, top_k(torch.zeros(1, 4), 2, [1.0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_wrong_use_of_top_k() -> None:
    brief = top_k(torch.zeros(2, 4), 2, [1.0])
    with pytest.raises(GraphError, match=r"teacher \[2, 4\]"):
        kd_loss(torch.zeros(2, 5), brief)
    with pytest.raises(DataError, match="no tail at temperature 2"):
        kd_loss(torch.zeros(2, 4), brief, temperature=2.0)
    with pytest.raises(ConfigError, match="no top-k"):
        kd_loss(torch.zeros(2, 4), brief, task="multilabel")
