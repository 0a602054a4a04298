"""Local graphs and batches: matrices by hand, normalisation by degrees of the whole graph.

The example used throughout, with a self-loop at 0 and node 3 without in-edges::

    0 -> 0    1 -> 0    0 -> 2    1 -> 2    3 -> 2    2 -> 1
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from gkd_dist.graph import Batch, LocalGraph, WeightedPattern

EDGES = torch.tensor([[3, 0, 1, 2, 1, 0], [2, 0, 0, 1, 2, 2]])  # in no order
WEIGHT = torch.tensor([6.0, 1.0, 2.0, 3.0, 5.0, 4.0])  # of 3->2, 0->0, 1->0, 2->1, 1->2, 0->2


def example(weighted: bool = False) -> LocalGraph:
    return LocalGraph.from_edge_index(EDGES, 4, WEIGHT if weighted else None)


def dense(matrix: WeightedPattern) -> Tensor:
    return matrix.matmul(torch.eye(matrix.pattern.num_rows))


# --- structure -------------------------------------------------------------------------------


def test_edges_are_sorted_by_target_then_source() -> None:
    graph = example()
    assert graph.edge_index.tolist() == [[0, 1, 2, 0, 1, 3], [0, 0, 1, 2, 2, 2]]
    assert graph.pattern.indptr.tolist() == [0, 2, 3, 6, 6]
    assert (graph.num_nodes, graph.num_edges) == (4, 6)


def test_degrees_and_self_loops() -> None:
    assert example().in_degree.tolist() == [2, 1, 3, 0]
    assert example().has_self_loop.tolist() == [True, False, False, False]


def test_weights_follow_their_edges_and_make_the_degree() -> None:
    graph = example(weighted=True)
    assert graph.edge_weight is not None
    assert graph.edge_weight.tolist() == [1, 2, 3, 4, 5, 6]
    assert graph.in_degree.tolist() == [3, 3, 15, 0]


def test_global_ids_are_those_that_were_given_or_the_order_itself() -> None:
    graph = example()
    assert graph.global_ids().tolist() == [0, 1, 2, 3]
    graph = replace(graph, n_id=torch.tensor([7, 5, 6, 9]))
    assert graph.global_ids().tolist() == [7, 5, 6, 9]
    moved = graph.to("meta").n_id
    assert moved is not None
    assert moved.device == torch.device("meta")


def test_attributes_follow_their_edges_and_move_with_them() -> None:
    graph = LocalGraph.from_edge_index(EDGES, 4, edge_attr=EDGES.t())
    for found in (graph, graph.to("meta")):
        assert found.edge_attr is not None
        assert found.edge_attr.dtype == torch.float32
        assert found.edge_attr.device == found.in_degree.device
    assert torch.equal(graph.edge_attr, graph.edge_index.t().float())  # type: ignore[arg-type]


def test_a_graph_without_nodes_or_edges() -> None:
    none = torch.empty(2, 0, dtype=torch.int64)
    for num_nodes in (0, 3):
        graph = LocalGraph.from_edge_index(none, num_nodes)
        assert (graph.num_nodes, graph.num_edges) == (num_nodes, 0)
        assert dense(graph.gcn_matrix()).tolist() == torch.eye(num_nodes).tolist()


# --- matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_mean_do_not_use_weights(weighted: bool) -> None:
    graph = example(weighted)
    assert dense(graph.sum_matrix()).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    third = pytest.approx(1 / 3)
    expected = [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [third, third, 0, third], [0, 0, 0, 0]]
    assert dense(graph.mean_matrix()).tolist() == expected


def test_gcn_matrix_by_hand() -> None:
    # degrees with the loops that are missing: 2 (its loop exists), 2, 4, 1
    found = dense(example().gcn_matrix())
    half, eighth, quarter = 1 / 2, 1 / math.sqrt(8), 1 / 4
    expected = [[half, half, 0, 0], [0, half, eighth, 0], [eighth, eighth, quarter, half], [0, 0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_an_existing_self_loop_keeps_its_weight() -> None:
    found = dense(example(weighted=True).gcn_matrix())  # degrees 3, 4, 16, 1
    assert found[0, 0].item() == pytest.approx(1 / 3)
    assert found[0, 1].item() == pytest.approx(2 / math.sqrt(12))
    assert found[1].tolist() == pytest.approx([0, 1 / 4, 3 / 8, 0])
    assert found[2, 3].item() == pytest.approx(6 / 4)


def test_gcn_matrix_uses_degrees_of_the_whole_graph() -> None:
    cut = replace(example(), in_degree=torch.tensor([2.0, 1.0, 3.0, 8.0]))
    assert dense(example().gcn_matrix())[2, 3].item() == pytest.approx(1 / 2)
    assert dense(cut.gcn_matrix())[2, 3].item() == pytest.approx(1 / 6)


def test_loop_pattern_has_one_loop_everywhere() -> None:
    pattern = example().loop_pattern()
    assert pattern.rows().tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert pattern.indices.tolist() == [0, 1, 1, 2, 0, 1, 2, 3, 3]


def test_matrices_are_built_once() -> None:
    graph, calls = example(), []
    assert graph.gcn_matrix() is graph.gcn_matrix()
    assert graph.loop_pattern() is graph.loop_pattern()
    for _ in range(2):
        assert graph.derived("answer", lambda: calls.append(1) or 42) == 42
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_products_keep_the_type_of_their_input(dtype: torch.dtype) -> None:
    matrix = example(weighted=True).gcn_matrix()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    low = x.to(dtype).requires_grad_()
    found = matrix.matmul(low)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), matrix.matmul(x), rtol=0.02, atol=0.02)
    found.sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == dtype
    column_sums = dense(matrix).sum(0).unsqueeze(1).expand(4, 3)
    torch.testing.assert_close(low.grad.float(), column_sums, rtol=0.02, atol=0.02)


# --- batches ---------------------------------------------------------------------------------


def batch() -> Batch:
    """Nodes 0 to 2 of the example are owned, 3 is halo."""
    flags = torch.tensor([True, False, False])
    return Batch(
        unit=7,
        graph=replace(example(weighted=True), num_owned=3),
        x=torch.randn(4, 2),
        y=torch.tensor([0, 1, -1]),
        train_mask=flags,
        val_mask=flags.roll(1),
        test_mask=flags.roll(2),
        n_id=torch.tensor([10, 11, 12, 5]),
        num_owned=3,
        teacher_logits=torch.randn(3, 2),
        teacher_scores={(1, "dot"): torch.randn(6)},
    )


def test_owned_edges_come_first() -> None:
    assert batch().num_owned_edges == 6
    assert replace(batch(), num_owned=2).num_owned_edges == 3
    assert replace(batch(), num_owned=0).num_owned_edges == 0


def test_masks_by_name() -> None:
    assert [batch().mask(split).tolist().index(True) for split in ("train", "val", "test")] == [0, 1, 2]


def test_a_batch_moves_with_everything_in_it() -> None:
    moved = batch().to("meta")
    pattern = moved.graph.pattern
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    tensors += [*moved.teacher_scores.values(), *(getattr(pattern, field.name) for field in fields(pattern))]
    tensors += [value for value in vars(moved.graph).values() if isinstance(value, Tensor)]
    assert len(tensors) == 7 + 1 + 5 + 3
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.unit, moved.num_owned, moved.graph.num_owned) == (7, 3, 3)


def test_a_batch_without_knowledge_moves_too() -> None:
    moved = replace(batch(), teacher_logits=None, teacher_scores={}).to("meta")
    assert moved.teacher_logits is None
    assert moved.teacher_scores == {}


def test_what_is_there_already_is_not_copied() -> None:
    graph = example()
    assert graph.to("cpu") is graph


def test_a_graph_that_is_replaced_does_not_keep_the_matrices_of_the_old_one() -> None:
    graph = example()
    before = graph.gcn_matrix()
    other = replace(graph, in_degree=graph.in_degree + 1)
    assert not torch.equal(other.gcn_matrix().values, before.values)
    assert graph.gcn_matrix() is before
