"""Cross-entropy on labelled training nodes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gkd_dist.losses.label import label_sum, labelled

NAN = float("nan")


def test_multiclass_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0], [5.0, 1.0]])
    y, mask = torch.tensor([1, 0, 0]), torch.tensor([True, True, False])
    # log 2 for the first, log(1 + e) for the second; the third is not a training node.
    expected = torch.tensor(2.0).log() + torch.tensor(1 + torch.e).log()
    torch.testing.assert_close(label_sum(logits, y, mask, "multiclass"), expected)


def test_multilabel_by_hand() -> None:
    logits, y = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    # Every label costs log 2; the mean over a node's labels too.
    loss = label_sum(logits, y, torch.tensor([True, True]), "multilabel")
    torch.testing.assert_close(loss, 2 * torch.tensor(2.0).log())


def test_unlabelled_nodes_do_not_count_whatever_the_mask_says() -> None:
    mask = torch.tensor([True, True])
    assert labelled(torch.tensor([-1, 0]), mask, "multiclass").tolist() == [False, True]
    y = torch.tensor([[NAN, NAN], [0.0, 1.0]])
    assert labelled(y, mask, "multilabel").tolist() == [False, True]
    logits = torch.randn(2, 2, requires_grad=True)
    label_sum(logits, y, mask, "multilabel").backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_no_training_node_gives_a_connected_zero(task: str) -> None:
    for size in (0, 3):
        logits = torch.randn(size, 2, requires_grad=True)
        y = torch.zeros(size, dtype=torch.int64) if task == "multiclass" else torch.zeros(size, 2)
        loss = label_sum(logits, y, torch.zeros(size, dtype=torch.bool), task)  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert logits.grad.abs().sum() == 0


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(50, 4).bfloat16()
    y, mask = torch.randint(0, 4, (50,)), torch.ones(50, dtype=torch.bool)
    loss = label_sum(logits, y, mask, "multiclass")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), y, reduction="sum"))
