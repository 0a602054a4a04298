"""Dropout by node: the same for every copy, as often as asked for, and independent where it must be."""

from __future__ import annotations

import pytest
import torch

from gkd_dist.config import ModelConfig
from gkd_dist.graph import LocalGraph
from gkd_dist.models.layered import LayeredModel
from gkd_dist.noise import NodeNoise, splitmix64, splitmix64_

# The first outputs of the reference implementation (Vigna, https://prng.di.unimi.it/splitmix64.c) for the seed 0.
FIRST = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
GOLDEN = 0x9E3779B97F4A7C15


def noise(*n_id: int, key: int = 1) -> NodeNoise:
    return NodeNoise(torch.tensor(n_id), key)


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def mask(draw: NodeNoise, width: int, rate: float, layer: int = 1) -> torch.Tensor:
    return draw.drop(torch.ones(draw.n_id.numel(), width), rate, layer) != 0


def test_the_hash_is_splitmix64():
    states = [(k * GOLDEN) % (1 << 64) for k in range(3)]
    assert tuple(splitmix64(state) for state in states) == FIRST
    tensor = torch.tensor([signed(state) for state in states])
    assert splitmix64_(tensor).tolist() == [signed(word) for word in FIRST]


def test_a_node_drops_the_same_channels_wherever_it_is():
    here, there = mask(noise(7, 3, 5), 10, 0.5), mask(noise(3, 9, 8, 7), 10, 0.5)
    assert torch.equal(here[0], there[3])
    assert torch.equal(here[1], there[0])


def test_another_key_or_layer_drops_others():
    n_id = tuple(range(40))
    first = mask(noise(*n_id), 16, 0.5)
    assert not torch.equal(first, mask(noise(*n_id, key=2), 16, 0.5))
    assert not torch.equal(first, mask(noise(*n_id), 16, 0.5, layer=2))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rates_are_met_and_values_scaled(rate):
    draw = NodeNoise(torch.arange(20_000), 5)
    values = draw.drop(torch.ones(20_000, 30), rate, 3)
    kept = (values != 0).double()
    bound = 5 * (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < bound / 600_000**0.5
    assert (kept.mean(0) - (1 - rate)).abs().max() < bound / 20_000**0.5  # every channel by itself
    assert (kept.mean(1) - (1 - rate)).abs().mean() < bound / 30**0.5  # and every node
    assert torch.allclose(values[values != 0], torch.tensor(1 / (1 - rate)), rtol=1e-4)


def test_channels_and_nodes_are_uncorrelated():
    kept = mask(NodeNoise(torch.arange(4000), 11), 64, 0.5).double() * 2 - 1
    channels = (kept.t() @ kept / 4000).fill_diagonal_(0)
    assert channels.abs().max() < 6 / 4000**0.5
    next_node = (kept[:-1] * kept[1:]).mean(1)
    assert next_node.abs().mean() < 1.2 * (2 / torch.pi) ** 0.5 / 64**0.5
    # four channels share a hash, and pairs of nodes must not repeat what one channel says in the next
    quadruple = kept[:-1, :-1] * kept[:-1, 1:] * kept[1:, :-1] * kept[1:, 1:]
    assert abs(quadruple.mean()) < 6 / quadruple.numel() ** 0.5


def test_the_gradient_passes_where_the_value_did():
    h = torch.randn(50, 7, requires_grad=True)
    out = NodeNoise(torch.arange(50), 2).drop(h, 0.25, 1)
    out.backward(torch.ones_like(out))
    assert torch.equal(h.grad != 0, out != 0)
    assert torch.allclose(h.grad * h, out)


def test_edges_drop_by_their_ends_and_direction():
    draw = noise(*range(100, 140))
    source, target = torch.arange(39), torch.arange(1, 40)
    ones = torch.ones(39, 8)
    there = draw.drop_edges(ones, 0.5, 1, source, target)
    assert not torch.equal(there, draw.drop_edges(ones, 0.5, 1, target, source))
    moved = NodeNoise(draw.n_id.flip(0), 1)  # the same nodes under other local numbers
    assert torch.equal(there, moved.drop_edges(ones, 0.5, 1, 39 - source, 39 - target))


@pytest.mark.parametrize("rate", [0.0, 0.999999])
def test_rates_at_the_ends(rate):
    out = noise(1, 2).drop(torch.ones(2, 3), rate, 1)
    assert torch.equal(out, torch.full((2, 3), 1.0 if rate == 0 else 0.0))


def test_empty_and_low_precision():
    assert NodeNoise(torch.empty(0, dtype=torch.int64), 1).drop(torch.ones(0, 5), 0.5, 1).shape == (0, 5)
    half = noise(1, 2).drop(torch.ones(2, 9, dtype=torch.bfloat16), 0.5, 1)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.float(), noise(1, 2).drop(torch.ones(2, 9), 0.5, 1))


@pytest.mark.parametrize("kind", ["gcn", "gat"])
@pytest.mark.parametrize("dropout_mask", ["node", "unit"])
def test_a_model_drops_by_node_where_it_is_told_to(kind, dropout_mask):
    """Nodes under other local numbers get the same outputs exactly where masks go by node."""
    heads = {"heads": 2} if kind == "gat" else {}
    options = {"kind": kind, "hidden": 8, "dropout": 0.5, "input_dropout": 0.3, "dropout_mask": dropout_mask, **heads}
    torch.manual_seed(0)
    model = LayeredModel(ModelConfig.model_validate(options), 6, 3).train()
    x, edge_index = torch.randn(30, 6), torch.randint(0, 30, (2, 150)).unique(dim=1)
    order = torch.randperm(30)
    place = torch.argsort(order)
    here = LocalGraph.from_edge_index(edge_index, 30).with_noise(NodeNoise(torch.arange(30), 4))
    there = LocalGraph.from_edge_index(place[edge_index], 30).with_noise(NodeNoise(order, 4))
    same = torch.allclose(model(x, here)[order], model(x[order], there), atol=1e-5)
    assert same == (dropout_mask == "node")
