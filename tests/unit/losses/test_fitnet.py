"""Hints: values by hand, against a dense reference over cut graphs, gradients in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gkd_dist.config import FitnetLoss, KdLoss
from gkd_dist.errors import DataError, GraphError
from gkd_dist.graph import Batch
from gkd_dist.losses import Objective, fitnet_loss
from gkd_dist.stream.units import empty_batch


def hint(**options: object) -> FitnetLoss:
    return FitnetLoss.model_validate({"kind": "fitnet", **options})


def objective(*losses: FitnetLoss | KdLoss) -> Objective:
    return Objective(losses, "multiclass", teacher_layers=3, student_layers=2, teacher_medians={})


def batch_of(teacher: torch.Tensor) -> Batch:
    empty, count = empty_batch(2, 3, "multiclass"), teacher.size(0)
    return replace(empty, unit=0, num_owned=count, teacher_embeddings={(2, None): teacher})


def test_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert float(fitnet_loss(student, teacher)) == pytest.approx((1 / 2 + 13 / 2) / 2)


def test_normalised_by_hand() -> None:
    found = fitnet_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), normalize=True)
    assert float(found) == pytest.approx((0.6**2 + 0.2**2) / 2)


def test_normalised_knows_no_lengths() -> None:
    z, t = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(fitnet_loss(7 * z, t, normalize=True), fitnet_loss(z, 0.1 * t, normalize=True))
    assert float(fitnet_loss(3 * t, t, normalize=True)) < 1e-12


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_exact(normalize: bool) -> None:
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fitnet_loss(z, t, normalize=normalize), (z,))
    fitnet_loss(z, t, normalize=normalize).backward()
    assert t.grad is None


def test_halves_are_computed_in_fp32() -> None:
    z, t = torch.full((2, 4), 300.0).half(), torch.zeros(2, 4).half()
    assert float(fitnet_loss(z, t)) == pytest.approx(90_000.0)  # overflows in fp16


def test_other_shapes_are_refused() -> None:
    with pytest.raises(GraphError, match="project the student's layer"):
        fitnet_loss(torch.zeros(3, 4), torch.zeros(3, 5))


@pytest.mark.parametrize("normalize", [False, True])
def test_parts_add_up_to_the_whole(normalize: bool) -> None:
    goal = objective(hint(normalize=normalize, student_layer=1))
    assert (goal.outputs, goal.student_layers) == (("fitnet",), ())
    z, t, logits = (torch.randn(10, d, dtype=torch.float64) for d in (4, 4, 3))
    sums, counts = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 9), slice(9, 10), slice(10, 10)):
        batch = batch_of(t[rows])
        counts += goal.counts(batch)
        sums += goal.sums(batch, logits[rows], {"fitnet": z[rows]})
    a, b = (z / z.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)) if normalize else (z, t)
    assert float(counts) == 10
    torch.testing.assert_close(sums / counts, ((a - b) ** 2).mean().reshape(1))


def test_a_term_that_is_off_still_reaches_its_head() -> None:
    goal = objective(KdLoss(kind="kd"), hint(schedule={"start": 3}))
    z, logits = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    batch = replace(batch_of(torch.zeros(2, 4)), teacher_logits=torch.zeros(2, 3))
    goal.sums(batch, logits, {"fitnet": z}, epoch=0).sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_what_is_missing_is_said() -> None:
    goal = objective(hint())
    with pytest.raises(DataError, match=r"needs embeddings of teacher layer 2, but unit 0 has none; run `gkd infer`"):
        goal.sums(replace(batch_of(torch.zeros(2, 4)), teacher_embeddings={}), torch.zeros(2, 3), {})
    with pytest.raises(DataError, match=r"\[2, 5\], the teacher's \[2, 4\]; set projection to auto"):
        goal.sums(batch_of(torch.zeros(2, 4)), torch.zeros(2, 3), {"fitnet": torch.zeros(2, 5)})
