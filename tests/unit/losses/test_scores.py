"""Edge scores: small answers by hand, formulas, gradients, precision and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.losses import Neighbours, edge_scores
from gkd_dist.losses.scores import METRICS, pattern_scores

FORMULAS = {
    "sqeuclidean": lambda a, b: (a - b).square().sum(1),
    "manhattan": lambda a, b: (a - b).abs().sum(1),
    "cosine": lambda a, b: torch.nn.functional.cosine_similarity(a, b, eps=1e-30),
    "dot": lambda a, b: (a * b).sum(1),
}


def gathered(z: Tensor, edge_index: Tensor, metric: str) -> Tensor:
    """The same by gathering both ends of every edge: the [E, d] tensors that we avoid."""
    return FORMULAS[metric](z[edge_index[1]], z[edge_index[0]])


def random_case(num_nodes: int, num_edges: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_nodes, width, dtype=torch.float64, generator=generator)
    return z, torch.randint(0, num_nodes, (2, num_edges), generator=generator)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("sqeuclidean", [25.0, 8.0, 0.0]), ("manhattan", [7.0, 4.0, 0.0]), ("dot", [0.0, 11.0, 25.0])],
)
def test_by_hand_in_the_order_of_the_edges(metric: str, expected: list[float]) -> None:
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 2.0]])
    edge_index = torch.tensor([[0, 2, 1], [1, 1, 1]])
    assert edge_scores(z, edge_index, metric).tolist() == expected


def test_cosine_by_hand() -> None:
    z = torch.tensor([[2.0, 0.0], [3.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    edge_index = torch.tensor([[1, 2, 3], [0, 0, 0]])
    torch.testing.assert_close(edge_scores(z, edge_index, "cosine"), torch.tensor([0.5**0.5, -1.0, 0.0]))


@pytest.mark.parametrize("metric", METRICS)
@given(num_nodes=st.integers(1, 9), num_edges=st.integers(0, 40), width=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_equal_the_gathered_form(
    metric: str, num_nodes: int, num_edges: int, width: int, seed: int
) -> None:
    z, edge_index = random_case(num_nodes, num_edges, width, seed)
    z.requires_grad_()
    ours, theirs = edge_scores(z, edge_index, metric), gathered(z, edge_index, metric)
    torch.testing.assert_close(ours, theirs)
    weight = torch.linspace(-1, 2, num_edges, dtype=torch.float64)
    (grad,) = torch.autograd.grad((ours * weight).sum(), z)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), z)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("undirected", [False, True])
def test_gradcheck(metric: str, undirected: bool) -> None:
    z, edge_index = random_case(6, 14, 3, seed=1)
    if undirected:
        edge_index = torch.cat([edge_index, edge_index.flip(0)], 1)
    assert torch.autograd.gradcheck(lambda z: edge_scores(z, edge_index, metric), (z.requires_grad_(),))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_precision(metric: str, dtype: torch.dtype, result: torch.dtype) -> None:
    z64, edge_index = random_case(8, 30, 16, seed=2)
    z = z64.to(dtype).requires_grad_()
    scores = edge_scores(z, edge_index, metric)
    assert scores.dtype == result
    # Against the formula in double precision on the same, already rounded, embeddings.
    torch.testing.assert_close(scores.double(), gathered(z.double(), edge_index, metric), rtol=2e-6, atol=2e-6)
    scores.sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype


def test_near_neighbours_far_from_the_origin_do_not_cancel() -> None:
    # ‖a‖² + ‖b‖² − 2ab in fp32 gives 0 or noise here: the norms are 10⁸ times the distance.
    z64, edge_index = random_case(50, 400, 8, seed=3)
    z = (z64 + 4096).float().requires_grad_()
    exact = gathered(z.detach().double(), edge_index, "sqeuclidean")
    scores = edge_scores(z, edge_index)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=0)
    z64 = z.detach().double().requires_grad_()
    gathered(z64, edge_index, "sqeuclidean").sum().backward()
    scores.sum().backward()
    assert z.grad is not None
    assert z64.grad is not None
    assert (z.grad - z64.grad).norm() <= 1e-6 * z64.grad.norm()


def test_cosine_of_a_zero_row_has_no_gradient() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]], requires_grad=True)
    edge_scores(z, torch.tensor([[1, 0, 2], [0, 1, 1]]), "cosine").sum().backward()
    assert z.grad is not None
    assert z.grad[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(z.grad).all()


def test_autocast_leaves_scores_alone() -> None:
    z64, edge_index = random_case(8, 30, 16, seed=2)
    z = z64.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = edge_scores(z, edge_index, "dot")
    assert torch.equal(inside, edge_scores(z, edge_index, "dot"))


@pytest.mark.parametrize("metric", METRICS)
def test_no_edges_still_connect_the_graph(metric: str) -> None:
    for num_nodes in (0, 3):
        z = torch.randn(num_nodes, 4, requires_grad=True)
        scores = edge_scores(z, torch.zeros(2, 0, dtype=torch.int64), metric)
        assert scores.shape == (0,)
        scores.sum().backward()
        assert z.grad is not None
        assert z.grad.abs().sum() == 0


def test_neighbours_save_the_sort() -> None:
    z, edge_index = random_case(7, 30, 3, seed=4)
    neighbours = Neighbours.of_edges(edge_index, 7)
    scores = edge_scores(z, neighbours)
    assert torch.equal(scores, edge_scores(z, edge_index)[neighbours.picked])
    assert torch.equal(scores, pattern_scores(z, neighbours.pattern, "sqeuclidean"))


def test_wrong_input_is_named() -> None:
    z, edges = torch.zeros(3, 2), torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ConfigError, match="metric 'l7' is unknown; use one of sqeuclidean"):
        edge_scores(z, edges, "l7")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"names node 3, but there are 3 nodes"):
        edge_scores(z, edges + 1)
    with pytest.raises(GraphError, match=r"must be int64 \[2, E\] \(got torch.int32"):
        edge_scores(z, edges.int())
    with pytest.raises(GraphError, match=r"floating point of shape \[n, d\]"):
        edge_scores(torch.zeros(3), edges)
    with pytest.raises(GraphError, match="edges are of 3 nodes, but the embeddings have 4 rows"):
        edge_scores(torch.zeros(4, 2), Neighbours.of_edges(edges, 3))


# --- memory ----------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the number of values of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
        return out


NUM_EDGES, WIDTH = 20_000, 64


def footprint(scores) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Values of the largest tensor of forward and backward, and values kept in between."""
    z, edge_index = random_case(300, NUM_EDGES, WIDTH, seed=5)
    z = z.float().requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = scores(z, edge_index).sum()
        out.backward()
    return largest.numel, sum(kept.values())


@pytest.mark.parametrize("metric", METRICS)
def test_no_tensor_of_edges_times_channels(metric: str) -> None:
    largest, kept = footprint(lambda z, edges: edge_scores(z, edges, metric))
    assert largest < 0.25 * NUM_EDGES * WIDTH
    assert kept < 0.25 * NUM_EDGES * WIDTH


def test_the_memory_check_can_fail() -> None:
    largest, kept = footprint(lambda z, edges: gathered(z, edges, "sqeuclidean"))
    assert largest >= NUM_EDGES * WIDTH
    assert kept >= NUM_EDGES * WIDTH


def test_peak_memory_of_forward_and_backward_in_a_process_of_its_own() -> None:
    """The structures of the backward pass are part of it; gathering shows that the measurement sees [E, d]."""
    probe = Path(__file__).with_name("memory_probe.py")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(probe)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=110)
    shares = json.loads(done.stdout)
    assert shares.pop("gather") > 1
    assert shares.keys() == set(METRICS)
    assert max(shares.values()) < 0.25, shares


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_bits_again_and_with_other_threads(metric: str) -> None:
    z64, edge_index = random_case(300, 9000, 24, seed=8)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            z = z64.float().requires_grad_()
            scores = edge_scores(z, edge_index, metric)
            (scores * torch.linspace(-1, 2, 9000)).sum().backward()
            found.append((scores.detach(), z.grad))
    finally:
        torch.set_num_threads(before)
    for scores, grad in found[1:]:
        assert torch.equal(scores, found[0][0])
        assert torch.equal(grad, found[0][1])
