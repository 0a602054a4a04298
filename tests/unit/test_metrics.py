"""Accuracy and micro-F1 from counts that add up."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional import accuracy, f1_score

from gkd_dist.metrics import METRIC_NAMES, NUM_COUNTS, metric_of, predicted_labels, split_counts

ALL = torch.ones(4, dtype=torch.bool)


def test_accuracy_counts_labelled_nodes_of_the_mask() -> None:
    y, predicted = torch.tensor([0, 1, -1, 2]), torch.tensor([0, 2, 1, 2])
    assert split_counts(predicted, y, ALL).tolist() == [3, 2, 3, 3]
    assert split_counts(predicted, y, torch.tensor([True, True, True, False])).tolist() == [2, 1, 2, 2]
    assert metric_of(torch.tensor([2, 1, 2, 2])) == 0.5


def test_micro_f1_counts_labels() -> None:
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [torch.nan] * 3, [1.0, 1.0, 1.0]])
    predicted = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]]).bool()
    counts = split_counts(predicted, y, ALL)
    assert counts.tolist() == [3, 2, 3, 5]  # nodes; hits; predicted; actual
    assert metric_of(counts) == 2 * 2 / (3 + 5)


def test_predicted_labels_of_logits() -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2], [-1.0, -3.0, 0.0]])
    assert predicted_labels(logits, "multiclass").tolist() == [1, 2]
    # a logit of 0 predicts nothing
    assert predicted_labels(logits, "multilabel").tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.parametrize("y", [torch.full((4,), -1), torch.full((4, 2), torch.nan)], ids=["multiclass", "multilabel"])
def test_without_labelled_nodes_there_is_no_metric(y: torch.Tensor) -> None:
    counts = split_counts(torch.ones_like(y) > 0 if y.dim() == 2 else y, y, ALL)
    assert counts.tolist() == [0] * NUM_COUNTS
    assert metric_of(counts) is None


def test_no_hit_is_zero_and_not_nothing() -> None:
    assert metric_of(torch.tensor([5, 0, 5, 5])) == 0.0
    assert metric_of(torch.tensor([5, 0, 0, 0])) == 0.0  # neither predicted nor there


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_parts_add_up_to_torchmetrics(task: str) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(90, 5, generator=draw), torch.rand(90, generator=draw) < 0.7
    predicted = predicted_labels(logits, task)
    if task == "multiclass":
        y = torch.randint(5, (90,), generator=draw)
        expected = accuracy(predicted[mask], y[mask], "multiclass", num_classes=5)
    else:
        y = torch.randint(2, (90, 5), generator=draw).float()
        expected = f1_score(predicted[mask], y[mask].long(), "multilabel", num_labels=5, average="micro")
    total = torch.zeros(NUM_COUNTS, dtype=torch.int64)
    for rows in torch.arange(90).split([50, 0, 3, 37]):
        total += split_counts(predicted[rows], y[rows], mask[rows])
    assert metric_of(total) == pytest.approx(expected.item())


def test_every_task_has_a_name() -> None:
    assert METRIC_NAMES == {"multiclass": "accuracy", "multilabel": "micro_f1"}
