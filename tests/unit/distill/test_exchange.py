"""Who holds which parts, and who sends what: pure functions, checked for every pair of ranks in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stream_stores import graph_store, random_graph

from gkd_dist.config import DistillConfig
from gkd_dist.distill.exchange import HaloExchange, HaloPlan, rows_to_send, share_parts
from gkd_dist.distill.resident import HOPS, exchanges, plan_share
from gkd_dist.errors import GraphError, ModelError
from gkd_dist.models.build import build_model
from gkd_dist.models.trainable import require_layers
from gkd_dist.stream.units import UnitLoader
from gkd_dist.world import World
from tests.user_models import Plain

# --- shares ----------------------------------------------------------------------------------


def test_equal_parts_go_in_runs():
    assert share_parts([1.0] * 6, 3) == [(0, 1), (2, 3), (4, 5)]
    assert share_parts([1.0] * 7, 3) == [(0, 1), (2, 3, 4), (5, 6)]


def test_a_heavy_part_is_balanced_by_others_from_anywhere():
    shares = share_parts([4.0, 4.0, 1.0, 1.0, 1.0, 1.0], 2)
    assert sorted(sum([4.0, 4.0, 1.0, 1.0, 1.0, 1.0][p] for p in share) for share in shares) == [6.0, 6.0]


def test_ranks_beyond_the_parts_have_none():
    assert share_parts([1.0, 2.0], 4).count(()) == 2


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 12))
def test_every_part_has_one_rank_and_no_rank_is_much_heavier_than_it_must_be(costs, world_size):
    shares = share_parts(costs, world_size)
    assert len(shares) == world_size
    assert sorted(part for share in shares for part in share) == list(range(len(costs)))
    heaviest = max(sum(costs[part] for part in share) for share in shares)
    assert heaviest <= 1.1 * (sum(costs) / world_size + max(costs)) + 1e-6


# --- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_parts", "world_size"), [(1, 1), (5, 1), (5, 2), (5, 3), (7, 4), (2, 4)])
@pytest.mark.parametrize("stored_hops", [1, 3])
def test_what_one_rank_sends_is_what_the_other_waits_for(num_parts, world_size, stored_hops):
    """By global ids, for every pair of ranks; the graph is directed, so needs are not mutual."""
    store = graph_store(random_graph(60, 150, seed=num_parts), num_parts, stored_hops)
    shares = [tuple(range(num_parts))[rank::world_size] for rank in range(world_size)]
    loader = UnitLoader(store, None, shares, hops=HOPS)
    planned = [plan_share(loader, rank) for rank in range(world_size)]
    for receiver, (batch, plan) in enumerate(planned):
        assert plan.num_nodes == batch.n_id.numel()
        arrives = []
        for sender, (other, sending) in enumerate(planned):
            block = sending.send_rows.split(sending.send_counts)[receiver]
            assert block.numel() == plan.receive_counts[sender]
            assert sender != receiver or block.numel() == 0
            arrives.append(other.n_id[block])
        assert torch.equal(torch.cat(arrives), batch.n_id[batch.num_owned :])


def test_reordered_halo_keeps_the_edges():
    """In-edges of every owned node, by global ids and in their stored order, with the features of their sources."""
    graph = random_graph(60, 200, weighted=True, attributed=True)
    store = graph_store(graph, 6, 1)
    loader = UnitLoader(store, None, [(0, 3), (4, 5), (1, 2)], hops=HOPS)
    for rank in range(3):
        (batch, _), stored = plan_share(loader, rank), loader.load(rank)
        assert torch.equal(batch.x, graph.x[batch.n_id])
        for one in (batch.graph.edge_index, stored.graph.edge_index):
            assert torch.equal(one[1], stored.graph.edge_index[1])
        assert torch.equal(batch.n_id[batch.graph.edge_index[0]], stored.n_id[stored.graph.edge_index[0]])
        assert torch.equal(batch.graph.edge_weight, stored.graph.edge_weight)
        assert torch.equal(
            batch.graph.in_degree,
            stored.graph.in_degree[torch.argsort(stored.n_id)][torch.argsort(torch.argsort(batch.n_id))],
        )


def test_a_row_that_two_parts_of_a_rank_read_is_sent_once():
    part = {
        "send_part": torch.tensor([1, 2], dtype=torch.int32),
        "send_ptr": torch.tensor([0, 2, 4]),
        "send_rows": torch.tensor([0, 3, 3, 4], dtype=torch.int32),
    }
    rows = rows_to_send({0: part}, {0: 5}, [(0,), (1, 2)], 0)
    assert [block.tolist() for block in rows] == [[], [0, 3, 4]]


def test_gradients_of_one_row_from_several_ranks_are_added():
    """Row 1 goes to ranks 1 and 2, row 0 to rank 2; rank 0 has no halo itself."""
    plan = HaloPlan.of(2, [torch.empty(0, dtype=torch.int64), torch.tensor([1]), torch.tensor([0, 1])], [0, 0, 0])
    returned = torch.tensor([[10.0], [20.0], [40.0]])

    class Peers(World):
        def all_to_all(self, rows, sent, received, into=None):
            return returned if sum(received) else rows.new_empty(0, 1)

    owned = torch.tensor([[1.0], [2.0]], requires_grad=True)
    out = HaloExchange(plan, Peers()).fill(owned)
    assert torch.equal(out, owned)
    out.backward(torch.ones_like(out))
    assert owned.grad.tolist() == [[21.0], [51.0]]


def test_an_exchange_wants_the_owned_rows():
    plan = HaloPlan.of(2, [torch.empty(0, dtype=torch.int64)], [0])
    with pytest.raises(GraphError, match=r"needs the 2 owned rows \(got \[3, 1\]\)"):
        HaloExchange(plan, World()).fill(torch.ones(3, 1))


# --- what does not go together ---------------------------------------------------------------


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match=r"Plain does not follow the layer protocol.*set distill\.halo=hops"):
        require_layers(Plain(4, 2))


def test_layered_models_are_not():
    from gkd_dist.config import ModelConfig

    require_layers(build_model(ModelConfig(kind="gat"), 4, 2))


def test_a_step_is_the_whole_graph():
    assert DistillConfig(halo="exchange").units_per_step == "all"
    assert exchanges(DistillConfig(halo="exchange"))
    assert not exchanges(DistillConfig())
    with pytest.raises(ValueError, match=r"got units_per_step 2\); set units_per_step=all"):
        DistillConfig(halo="exchange", units_per_step=2)
    with pytest.raises(ValueError, match=r"got parts_per_unit 3\); leave parts_per_unit at 1"):
        DistillConfig(halo="exchange", parts_per_unit=3)
