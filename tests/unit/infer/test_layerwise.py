"""What one task computes, by hand on a part with two owned nodes and one halo node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gkd_dist.errors import ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.infer import layerwise

# Owned 0 and 1, halo 2 (of part 4) in hop 1, halo 3 (of part 1) in hop 2. Edges 2 -> 0, 0 -> 1, 3 -> 2.
COUNTS = {"num_owned": 2, "num_halo_1": 1}
PART = {
    "n_id": torch.tensor([10, 11, 30, 20]),
    "in_degree": torch.tensor([1.0, 1.0, 1.0, 0.0]),
    "has_self_loop": torch.zeros(4, dtype=torch.bool),
    "indptr": torch.tensor([0, 1, 2, 3]),
    "indices": torch.tensor([2, 0, 3], dtype=torch.int32),
    "halo_owner": torch.tensor([4, 1], dtype=torch.int32),
    "send_part": torch.tensor([1, 4], dtype=torch.int32),
    "send_ptr": torch.tensor([0, 1, 3]),
    "send_rows": torch.tensor([1, 1, 0], dtype=torch.int32),
}


class Sum(nn.Module):
    """z_l = sum of in-neighbours; activations double."""

    num_layers = 2

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        return graph.sum_matrix().matmul(h)

    def activate(self, layer: int, z: Tensor) -> Tensor:
        return 2 * z


def test_halo_sources_are_in_the_order_of_the_halo() -> None:
    assert layerwise.halo_sources(PART, COUNTS) == [4]


def test_a_layer_sees_first_hop_edges_and_keeps_owned_rows() -> None:
    graph = layerwise.one_hop_graph(PART, COUNTS)
    assert graph.edge_index.tolist() == [[2, 0], [0, 1]]
    z = layerwise.compute_layer(Sum(), 1, torch.tensor([[1.0], [2.0], [3.0]]), graph)
    assert z.tolist() == [[6.0], [2.0]]
    assert not z.requires_grad


def test_stored_rows_are_copied_in_the_order_of_each_reader() -> None:
    z = torch.tensor([[6.0], [2.0]])
    tensors = layerwise.layer_tensors(z, PART, with_copies=True)
    assert {name: tensor.flatten().tolist() for name, tensor in tensors.items()} == {
        "owned": [6.0, 2.0],
        "to-00001": [2.0],
        "to-00004": [2.0, 6.0],
    }
    assert set(layerwise.layer_tensors(z, PART, with_copies=False)) == {"owned"}


def test_scores_follow_the_edges() -> None:
    graph = layerwise.one_hop_graph(PART, COUNTS)
    scores = layerwise.edge_scores(torch.tensor([[1.0], [2.0], [5.0]]), graph, ["dot", "sqeuclidean"])
    assert scores["sqeuclidean"].tolist() == [16.0, 1.0]
    assert scores["dot"].tolist() == [5.0, 2.0]


def test_a_layer_of_the_wrong_shape_is_named() -> None:
    class Short(Sum):
        def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
            return h[:1]

    with pytest.raises(ModelError, match=r"forward_layer\(1\) of Short gave shape \[1, 1\] for 3 nodes"):
        layerwise.compute_layer(Short(), 1, torch.ones(3, 1), layerwise.one_hop_graph(PART, COUNTS))


def test_infinite_results_are_named() -> None:
    with pytest.raises(ModelError, match="logits of knowledge of part 3 has NaN or infinite"):
        layerwise.check_finite({"ok": torch.ones(1), "logits": torch.tensor([torch.inf])}, "knowledge of part 3")
