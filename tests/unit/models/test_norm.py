"""Batch normalisation over owned rows: equal to torch's on one batch, and independent of the cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gkd_dist.graph import LocalGraph
from gkd_dist.models.norm import OwnedBatchNorm


def without_edges(num_nodes: int, num_owned: int | None = None) -> LocalGraph:
    graph = LocalGraph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_nodes)
    graph.num_owned = num_owned
    return graph


def both(width: int = 3) -> tuple[OwnedBatchNorm, nn.BatchNorm1d]:
    ours, theirs = OwnedBatchNorm(width), nn.BatchNorm1d(width)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(width) + 0.5)
        ours.bias.normal_()
        ours.running_mean.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def rows(count: int, seed: int = 0) -> Tensor:
    """Far from zero, so that a variance by subtraction would suffer."""
    return 50 + 3 * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_one_full_batch_equals_torch() -> None:
    ours, theirs = both()
    x = rows(40).requires_grad_()
    y = x.detach().clone().requires_grad_()
    found, expected = ours(x, without_edges(40)), theirs(y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(40, 3)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_running_statistics_equal_torch_after_the_merge() -> None:
    ours, theirs = both()
    before = ours.running_mean.clone()
    ours(rows(40), without_edges(40))
    assert torch.equal(ours.running_mean, before), "forward must not touch running statistics"
    ours.merge(ours.take_pending())
    theirs(rows(40))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(rows(5, seed=1), without_edges(5)), theirs(rows(5, seed=1)))


@pytest.mark.parametrize("sizes", [[40], [20, 20], [1, 39], [7, 13, 20]])
def test_merge_by_count_does_not_depend_on_the_cut(sizes: list[int]) -> None:
    ours, theirs = both()
    for batch in rows(40).split(sizes):
        ours(batch, without_edges(batch.size(0)))
    ours.merge(ours.take_pending())
    theirs(rows(40))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_statistics_are_those_of_owned_rows() -> None:
    ours, theirs = both()
    x = torch.cat([rows(10), torch.full((4, 3), 1e4)])
    found = ours(x, without_edges(14, num_owned=10))
    torch.testing.assert_close(found[:10], theirs(rows(10)), rtol=1e-4, atol=1e-4)
    assert found[10:].abs().min().item() > 100  # halo rows are scaled alike, by statistics without them
    assert ours.take_pending()[-1] == 10


def test_pending_by_hand() -> None:
    norm = OwnedBatchNorm(2)
    norm(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), without_edges(2))
    norm(torch.tensor([[5.0, 6.0]]), without_edges(1))
    assert norm.take_pending().tolist() == [9.0, 12.0, 35.0, 56.0, 3.0]
    assert norm.take_pending().tolist() == [0.0] * 5, "taken once"


@pytest.mark.parametrize("num_nodes", [0, 3])
def test_a_batch_without_owned_rows(num_nodes: int) -> None:
    norm, _ = both()
    before = norm.running_mean.clone(), norm.running_var.clone()
    found = norm(rows(num_nodes), without_edges(num_nodes, num_owned=0))
    assert found.shape == (num_nodes, 3)
    assert torch.isfinite(found).all()
    found[:0].sum().backward()
    assert norm.weight.grad is not None
    assert not norm.weight.grad.any()
    pending = norm.take_pending()
    assert not pending.any()
    norm.merge(pending)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def test_a_single_row_is_finite() -> None:
    norm = OwnedBatchNorm(3)
    x = rows(1).requires_grad_()
    found = norm(x, without_edges(1))
    found.sum().backward()
    assert found.abs().max() == 0
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    norm.merge(norm.take_pending())
    torch.testing.assert_close(norm.running_var, torch.full((3,), 0.9))


def test_eval_mode_collects_nothing() -> None:
    norm = OwnedBatchNorm(3).eval()
    norm(rows(4), without_edges(4))
    assert not norm.take_pending().any()


def test_what_is_pending_is_not_stored() -> None:
    norm = OwnedBatchNorm(3)
    norm(rows(4), without_edges(4))
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
