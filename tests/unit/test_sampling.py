"""Sampled neighbours: by hand, as a set, as a distribution, and whatever the cut; what layers compute on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gkd_dist.config import ModelConfig
from gkd_dist.graph import LocalGraph
from gkd_dist.losses import Neighbours
from gkd_dist.models.build import build_model, resolve_model, run_model
from gkd_dist.models.convs import GCN, GIN, SAGE
from gkd_dist.models.tiny import TinyGraph, random_graph
from gkd_dist.noise import NodeNoise, splitmix64
from gkd_dist.sampling import ALL, LayerGraphs, sample_in_edges, sample_layers
from gkd_dist.sparse import CsrPattern

KEY = 1234
KINDS = ["gcn", "sage", "gat", "gin"]
PYG = ["GCN", "GraphSAGE", "GAT", "GIN", "PNA", "EdgeCNN"]
META = {"in_degree_histogram": {"0": 3, "2": 5, "4": 7}}


def star(*sources: int) -> LocalGraph:
    """Node 0 with these in-neighbours."""
    edges = torch.tensor([list(sources), [0] * len(sources)])
    return LocalGraph.from_edge_index(edges, max(sources) + 1)


def chosen(graph: LocalGraph, target: int, k: int, key: int = KEY, layer: int = 1) -> list[int]:
    """Global ids of the sources that ``target`` keeps."""
    positions, _ = sample_in_edges(graph, torch.tensor([target]), k, key, layer)
    return graph.global_ids()[graph.pattern.indices[positions]].tolist()


def model_of(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    given = {"kind": kind, "layers": 2, "hidden": 8, **options}
    return build_model(resolve_model(ModelConfig.model_validate(given), META), 6, 4)


def sampled(graph: LocalGraph, layers: LayerGraphs) -> LocalGraph:
    return replace(graph, layers=layers if graph.noise is None else layers.with_noise(graph.noise.key))


def noisy(tiny: TinyGraph, num_owned: int | None = None) -> LocalGraph:
    graph = replace(tiny.graph, num_owned=num_owned)
    return graph.with_noise(NodeNoise(graph.global_ids(), KEY))


# --- the choice ------------------------------------------------------------------------------


def reference_hash(key: int, layer: int, target: int, source: int) -> int:
    """The hash of an edge in plain integers, as a signed number."""
    word = splitmix64(splitmix64(target ^ splitmix64(splitmix64(key) + (1 << 32) + layer)) ^ source)
    return word - (1 << 64) if word >> 63 else word


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_smallest_hashes_by_hand(k: int, layer: int) -> None:
    expected = sorted([1, 2, 5, 9], key=lambda source: (reference_hash(KEY, layer, 0, source) >> 32) % (1 << 32))
    assert chosen(star(9, 2, 5, 1), 0, k, layer=layer) == sorted(expected[:k])


def test_a_mean_over_two_of_three_by_hand() -> None:
    graph = star(1, 2, 3)
    x = torch.tensor([[0.0], [1.0], [10.0], [100.0]])
    conv = SAGE(1, 1, bias=False)
    with torch.no_grad():
        conv.lin_l.weight.fill_(1), conv.lin_r.weight.fill_(0)
        layers = sample_layers(replace(graph, num_owned=1), [2], KEY, rows_alone=True)
        found = float(conv(x[layers.nodes], layers.graphs[0]))
    kept = chosen(graph, 0, 2)
    assert found == pytest.approx(sum(10.0 ** (source - 1) for source in kept) / 2)


@given(st.integers(0, 2**62), st.integers(1, 12), st.integers(1, 3), st.integers(0, 23))
@settings(max_examples=60, deadline=None)
def test_it_is_a_sample_without_replacement(key: int, k: int, layer: int, target: int) -> None:
    graph = random_graph(1, False, 0).graph
    everyone = chosen(graph, target, ALL, key, layer)
    kept = chosen(graph, target, k, key, layer)
    assert len(kept) == len(set(kept)) == min(k, len(everyone))
    assert set(kept) <= set(everyone)
    assert kept == sorted(kept)
    assert set(kept) <= set(chosen(graph, target, k + 1, key, layer))


@given(st.integers(0, 2**62), st.integers(1, 4), st.permutations(range(24)))
@settings(max_examples=40, deadline=None)
def test_it_knows_neither_the_cut_nor_the_order(key: int, k: int, order: list[int]) -> None:
    tiny = random_graph(1, False, 0)
    part, nodes = tiny.part(torch.tensor(order[:7]), 1)
    assert part.graph.num_nodes < 24
    for local, node in enumerate(nodes[:7].tolist()):
        assert sorted(chosen(part.graph, local, k, key)) == chosen(tiny.graph, node, k, key)


def test_every_neighbour_is_as_likely() -> None:
    graph, k, rounds = star(1, 2, 3, 4, 5, 6), 2, 3000
    kept = torch.tensor([chosen(graph, 0, k, key) for key in range(rounds)])
    share = torch.bincount(kept.flatten(), minlength=7)[1:] / rounds
    deviation = (share - k / 6).abs().max() / ((k / 6) * (1 - k / 6) / rounds) ** 0.5
    assert deviation < 4.5
    pairs = torch.bincount(kept[:, 0] * 7 + kept[:, 1])
    assert int((pairs > 0).sum()) == 15  # each pair occurs
    assert ((pairs[pairs > 0] / rounds - 1 / 15).abs() < 4.5 * (1 / 15 / rounds) ** 0.5).all()


def test_layers_and_steps_choose_for_themselves() -> None:
    graph, rounds = star(*range(1, 9)), 400
    layers = sum(chosen(graph, 0, 2, key, 1) == chosen(graph, 0, 2, key, 2) for key in range(rounds))
    steps = sum(chosen(graph, 0, 2, key) == chosen(graph, 0, 2, key + 1) for key in range(rounds))
    assert 0 < layers < 0.1 * rounds  # 1 of 28 by chance
    assert 0 < steps < 0.1 * rounds


def test_parallel_edges_are_chosen_one_by_one() -> None:
    double, rounds = star(1, 1, 2), 600
    counts = torch.zeros(3)
    for key in range(rounds):
        counts[chosen(double, 0, 2, key).count(1)] += 1
    assert counts[0] == 0  # two of three edges: at least one of the pair
    assert abs(float(counts[2]) / rounds - 1 / 3) < 0.1
    both = LocalGraph.from_edge_index(torch.tensor([[2, 3, 4, 1, 1], [0, 0, 0, 5, 5]]), 6)
    assert chosen(both, 0, 1) == chosen(star(2, 3, 4), 0, 1), "what else a part holds changes nothing"


# --- what layers compute ---------------------------------------------------------------------


@pytest.mark.parametrize("rows_alone", [True, False])
def test_only_what_is_reached_is_there(rows_alone: bool) -> None:
    chain = LocalGraph.from_edge_index(torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]]), 6)
    layers = sample_layers(replace(chain, num_owned=1), [1, 1], KEY, rows_alone=rows_alone)
    assert layers.nodes.tolist() == [0, 1, 2]
    assert layers.sizes == (3, 2, 1)
    assert [graph.num_edges for graph in layers.graphs] == [2, 1]
    assert [graph.num_rows for graph in layers.graphs] == ([2, 1] if rows_alone else [3, 2])
    further = sample_layers(replace(chain, num_owned=1), [1, 1], KEY, {1: torch.tensor([3])}, rows_alone=rows_alone)
    assert (further.nodes.tolist(), further.sizes) == ([0, 1, 3, 2, 4], (5, 3, 1))


def outputs(model: nn.Module, x: Tensor, graph: LocalGraph, owned: int, y: Tensor) -> dict[str, Tensor]:
    """Owned rows of logits and of layer 1, and all gradients of a loss on both."""
    model.zero_grad()
    logits, kept = run_model(model, x, graph, (1,))
    (logits[:owned] * y).sum().backward(retain_graph=True)
    kept[1][:owned].square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits[:owned], "layer 1": kept[1][:owned], **grads}


@pytest.mark.parametrize("name", [*KINDS, *(f"torch_geometric.nn:{name}" for name in PYG), "user_models:Layered"])
@pytest.mark.parametrize("weighted", [False, True])
def test_with_all_neighbours_it_is_the_full_pass(name: str, weighted: bool) -> None:
    if weighted and name == "user_models:Layered":
        pytest.skip("takes no weights")
    tiny = random_graph(6, weighted and name in ("gcn", "torch_geometric.nn:GCN"), 0)
    part, _ = tiny.part(torch.arange(6), 2)
    graph, y = noisy(part, 6), torch.randn(6, 4)
    model = model_of(name).train()
    expected = outputs(model, part.x, graph, 6, y)
    for fan_out in ([ALL, ALL], [50, 50]):
        layers = sample_layers(graph, fan_out, KEY, rows_alone=getattr(model, "rows_alone", False))
        found = outputs(model, part.x, sampled(graph, layers), 6, y)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=f"{key} {fan_out}")


@pytest.mark.parametrize(
    "conv", [GCN(3, 2), GIN(nn.Linear(3, 2)), SAGE(3, 2), SAGE(3, 2, aggr="sum"), GCN(3, 2, normalize=False)]
)
def test_sums_and_means_are_right_on_average(conv: nn.Module) -> None:
    tiny = random_graph(3, False, 0)
    with torch.no_grad():
        expected, total = conv(tiny.x, tiny.graph), torch.zeros(24, 2)
        rounds = 1500
        draws = []
        for key in range(rounds):
            layers = sample_layers(tiny.graph, [2], key, rows_alone=True)
            draws.append(conv(tiny.x[layers.nodes], layers.graphs[0]))
        total = torch.stack(draws)
    error = (total.mean(0) - expected).abs()
    assert (error <= 5 * total.std(0) / rounds**0.5 + 1e-5).all()
    assert total.std(0).max() > 0.01


@pytest.mark.parametrize("jk", ["cat", "max"])
def test_the_readout_sees_the_units_that_dropout_kept(jk: str) -> None:
    """As in PyG: what is dropped below a layer is dropped in the readout as well."""
    model = model_of("torch_geometric.nn:GCN", args={"jk": jk, "dropout": 0.5}).train()
    part, _ = random_graph(6, False, 0).part(torch.arange(6), 2)
    graph = noisy(part, 6)
    seen: list[Tensor] = []
    model.convs[1].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model.jk.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0]))
    run_model(model, part.x, sampled(graph, sample_layers(graph, [2, 2], KEY)))
    assert torch.equal(seen[0][: seen[1].size(0)], seen[1])


@pytest.mark.parametrize("kind", ["gat", "torch_geometric.nn:GCN"])
def test_layers_computed_again_are_the_same(kind: str) -> None:
    model = model_of(kind).train()
    part, _ = random_graph(6, False, 0).part(torch.arange(6), 2)
    graph = noisy(part, 6)
    inner = sampled(graph, sample_layers(graph, [2, 3], KEY, rows_alone=getattr(model, "rows_alone", False)))
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        run_model(model, part.x, inner, (1,), recompute)[0][:6].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


# --- the neighbours of a loss ----------------------------------------------------------------


def test_a_loss_looks_at_some_of_what_the_layer_above_looks_at() -> None:
    part, _ = random_graph(6, False, 0).part(torch.arange(6), 2)
    graph = noisy(part, 6)
    full = Neighbours.of_graph(graph, 6)
    few = full.sampled(graph, 2, 2)
    assert few.num_nodes == full.num_nodes
    assert torch.equal(few.pattern.indptr.diff(), full.pattern.indptr.diff().clamp_max(2))
    assert torch.equal(few.pattern.indices, graph.pattern.indices[few.picked])
    assert torch.equal(few.pattern.rows(), few.rows)
    layers = sample_layers(graph, [4, 1], KEY, {1: few.pattern.indices})
    without = sample_layers(graph, [4, 1], KEY)
    assert not bool(graph.has_self_loop[:6].any()) or without.sizes[1] <= layers.sizes[1]
    loops = part.graph.has_self_loop[:6]
    reached = set(layers.nodes[: layers.sizes[1]].tolist())
    for row, source in zip(few.rows.tolist(), few.pattern.indices.tolist(), strict=True):
        assert source in reached
        if not bool(loops[row]):
            assert source in without.nodes[: without.sizes[1]].tolist()


def test_a_pattern_may_have_fewer_rows() -> None:
    pattern = CsrPattern.from_csr(torch.tensor([0, 2]), torch.tensor([1, 3]), 4)
    assert pattern.t_indptr.tolist() == [0, 0, 1, 1, 2]
