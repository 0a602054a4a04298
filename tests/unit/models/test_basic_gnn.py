"""PyG's `BasicGNN` family, computed layer by layer on parts, against PyG's own forward on the whole graph (C1)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from hypothesis import given, settings
from hypothesis import strategies as st
from infer_worlds import assert_close, make_graph
from torch import Tensor, nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gkd_dist.config import ModelConfig, PartitionConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import Graph, LocalGraph
from gkd_dist.infer.layerwise import one_hop_graph, with_rows
from gkd_dist.models.basic_gnn import BasicGnnLayers
from gkd_dist.models.build import build_model, resolve_model, run_model
from gkd_dist.models.layered import as_layers, forward_layers, is_layered, why_not_layered
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage
from gkd_dist.stream.units import empty_batch

EDGE_DIM = 3
META = {"in_degree_histogram": {"0": 5, "2": 10, "4": 30, "7": 3}}
FAMILY = ("GCN", "GraphSAGE", "GAT", "GIN", "PNA", "EdgeCNN")


def config_of(name: str, layers: int = 3, **args: Any) -> ModelConfig:
    return ModelConfig(kind=f"torch_geometric.nn:{name}", layers=layers, hidden=8, args=args)


def model_of(name: str, layers: int = 3, **args: Any) -> BasicGNN:
    """A model in eval mode whose parameters and statistics are not their initial zeros and ones."""
    torch.manual_seed(0)
    model = build_model(resolve_model(config_of(name, layers, **args), META), 6, 4).eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    assert type(model) is getattr(pyg, name)
    return model


# --- graphs and their parts ------------------------------------------------------------------


def graph_of(kind: str) -> Graph:
    """Directed, with self-loops and isolated nodes; ``weights``, ``attributes``, both, or neither on its edges."""
    graph = make_graph(weighted="weights" in kind)
    if "attributes" not in kind:
        return graph
    attr = torch.randn(graph.num_edges, EDGE_DIM, generator=torch.Generator().manual_seed(2))
    return replace(graph, edge_attr=attr)


Cut = list[tuple[Tensor, int, LocalGraph]]  # per part: n_id of owned and first-hop nodes, number of owned, in-edges


@pytest.fixture(scope="module")
def cuts() -> dict[tuple[str, str], Cut]:
    """Parts of each kind of graph by each method, made when they are asked for."""

    class Cuts(dict[tuple[str, str], Cut]):
        def __missing__(self, key: tuple[str, str]) -> Cut:
            kind, method = key
            storage = Storage.open(f"memory://basic-gnn-{kind.replace(' ', '-')}-{method}")
            config = PartitionConfig(method=method, num_parts=3)
            build_graph_store(graph_of(kind), storage, config, halo_hops=1, seed=0, fingerprint="f")
            store = GraphStore.open(storage)
            self[key] = [part_of(store, index) for index in range(store.num_parts)]
            return self[key]

    return Cuts()


def part_of(store: GraphStore, index: int) -> tuple[Tensor, int, LocalGraph]:
    part, counts = store.part(index), store.manifest.parts[index].counts
    num_owned = counts["num_owned"]
    return (
        part["n_id"][: num_owned + counts["num_halo_1"]],
        num_owned,
        with_rows(one_hop_graph(part, counts), num_owned + counts["num_halo_1"]),
    )


@torch.no_grad()
def by_parts(model: nn.Module, x: Tensor, cut: Cut) -> Tensor:
    """Logits of all nodes: layer after layer, each part from the rows that its own and bordering parts gave."""
    stack = as_layers(model)
    assert stack is not None, why_not_layered(model)
    below, outputs = x, {}
    for layer in range(1, stack.num_layers + 1):
        rows = {}
        for n_id, num_owned, graph in cut:
            z = stack.forward_layer(layer, stack.activate(layer - 1, below[n_id]), graph)
            rows |= dict(zip(n_id[:num_owned].tolist(), z[:num_owned], strict=True))
        below = outputs[layer] = torch.stack([rows[node] for node in range(x.size(0))])
    logits = torch.full((x.size(0), 4), torch.nan)
    for n_id, num_owned, _ in cut:
        owned = n_id[:num_owned]
        logits[owned] = stack.readout({layer: outputs[layer][owned] for layer in stack.readout_layers})
    return logits


@torch.no_grad()
def by_pyg(model: nn.Module, graph: Graph, reads_attributes: bool) -> Tensor:
    attr = graph.edge_attr if reads_attributes else None
    return model(graph.x, graph.edge_index, edge_weight=graph.edge_weight, edge_attr=attr)


# --- C1: what is computed on parts is what PyG computes on the whole graph --------------------

E = {"edge_dim": EDGE_DIM}
CONVS: list[tuple[str, str, dict[str, Any]]] = [
    ("GCN", "plain", {}),
    ("GCN", "weights", {}),
    ("GCN", "plain", {"improved": True}),
    ("GCN", "weights", {"improved": True, "bias": False}),
    ("GCN", "plain", {"add_self_loops": False}),
    ("GCN", "weights", {"add_self_loops": False}),
    ("GCN", "plain", {"normalize": False}),
    ("GCN", "weights", {"normalize": False}),
    ("GraphSAGE", "plain", {}),
    ("GraphSAGE", "weights", {}),
    ("GraphSAGE", "plain", {"aggr": "sum", "project": True, "normalize": True}),
    ("GraphSAGE", "plain", {"aggr": "max", "root_weight": False}),
    ("GraphSAGE", "plain", {"aggr": "softmax", "bias": False}),
    ("GraphSAGE", "plain", {"aggr": ["mean", "max", "std"]}),
    ("GAT", "plain", {"heads": 4}),
    ("GAT", "weights", {"heads": 4, "residual": True, "concat": False}),
    ("GAT", "plain", {"heads": 2, "add_self_loops": False, "negative_slope": 0.5, "bias": False}),
    ("GAT", "attributes", {"heads": 2}),
    ("GAT", "attributes", {"heads": 2, **E}),
    ("GAT", "attributes", {"heads": 2, **E, "fill_value": 0.5}),
    ("GAT", "attributes", {"heads": 2, **E, "fill_value": "max"}),
    ("GAT", "weights and attributes", {"heads": 2, **E, "add_self_loops": False}),
    ("GAT", "plain", {"v2": True, "heads": 4, "residual": True}),
    ("GAT", "attributes", {"v2": True, "heads": 2, **E}),
    ("GAT", "attributes", {"v2": True, "heads": 2, **E, "fill_value": "add", "share_weights": True}),
    ("GAT", "attributes", {"v2": True, "add_self_loops": False}),
    ("GIN", "plain", {}),
    ("GIN", "weights", {"train_eps": True, "eps": 0.3}),
    ("GIN", "plain", {"aggr": "max"}),
    ("PNA", "plain", {}),
    ("PNA", "attributes", {**E, "towers": 2, "divide_input": False, "pre_layers": 2, "post_layers": 2}),
    ("PNA", "attributes", {"aggregators": ["sum", "var"], "scalers": ["linear", "inverse_linear"]}),
    ("EdgeCNN", "plain", {}),
    ("EdgeCNN", "plain", {"aggr": "mean"}),
]


@pytest.mark.parametrize("method", ["random", "metis"])
@pytest.mark.parametrize(("name", "kind", "options"), CONVS, ids=lambda value: str(value).replace(" ", ""))
def test_every_option_of_every_convolution(
    cuts: Any, name: str, kind: str, options: dict[str, Any], method: str
) -> None:
    graph, model = graph_of(kind), model_of(name, norm="batch_norm", **options)
    assert_close(by_parts(model, graph.x, cuts[kind, method]), by_pyg(model, graph, "edge_dim" in options))


BETWEEN: list[dict[str, Any]] = [
    {"norm": None, "act": "relu"},
    {"norm": "batch_norm", "act": "elu", "dropout": 0.5},
    {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}, "act": "leaky_relu", "act_kwargs": {"negative_slope": 0.3}},
    {"norm": "batch_norm", "act": "relu", "act_first": True},
    {"norm": "instance_norm", "norm_kwargs": {"track_running_stats": True}, "act": None},
    {"norm": "diff_group_norm", "norm_kwargs": {"groups": 2}, "act": "prelu"},
]


@pytest.mark.parametrize("jk", [None, "last", "cat", "max", "lstm"])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda options: f"{options['norm']}-{options['act']}")
@pytest.mark.parametrize("name", FAMILY)
def test_norm_activation_and_jumping_knowledge(cuts: Any, name: str, between: dict[str, Any], jk: str | None) -> None:
    graph, model = graph_of("plain"), model_of(name, jk=jk, **between)
    assert_close(by_parts(model, graph.x, cuts["plain", "metis"]), by_pyg(model, graph, False))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_any_depth(cuts: Any, name: str, layers: int) -> None:
    graph, model = graph_of("plain"), model_of(name, layers, jk="cat", norm="batch_norm")
    assert_close(by_parts(model, graph.x, cuts["plain", "random"]), by_pyg(model, graph, False))


def test_undirected_graphs() -> None:
    graph = make_graph()
    edges = torch.unique(torch.cat([graph.edge_index, graph.edge_index.flip(0)], dim=1), dim=1)
    for name in FAMILY:
        model = model_of(name)
        logits, _ = forward_layers(model, graph.x, LocalGraph.from_edge_index(edges, graph.num_nodes))
        assert_close(logits.detach(), model(graph.x, edges).detach())


def one_hop(edges: Tensor, owned: Tensor, num_nodes: int) -> tuple[Tensor, int, LocalGraph]:
    """A part by the definition: in-edges of ``owned``, degrees and self-loops of the whole graph."""
    whole = LocalGraph.from_edge_index(edges, num_nodes)
    kept = edges[:, torch.isin(edges[1], owned)]
    halo = torch.unique(kept[0][~torch.isin(kept[0], owned)])
    n_id = torch.cat([owned, halo])
    place = torch.full((num_nodes,), -1).index_copy(0, n_id, torch.arange(n_id.numel()))
    local = LocalGraph.from_edge_index(place[kept], n_id.numel())
    return n_id, owned.numel(), replace(local, in_degree=whole.in_degree[n_id], has_self_loop=whole.has_self_loop[n_id])


@settings(deadline=None, max_examples=25)
@given(data=st.data(), name=st.sampled_from(FAMILY))
def test_any_graph_cut_in_any_way(data: st.DataObject, name: str) -> None:
    num_nodes = data.draw(st.integers(1, 8))
    node = st.integers(0, num_nodes - 1)
    pairs = sorted(data.draw(st.sets(st.tuples(node, node), max_size=20)))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t()
    assign = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=num_nodes, max_size=num_nodes)))
    model, x = model_of(name, 2, jk="max"), torch.randn(num_nodes, 6, generator=torch.Generator().manual_seed(0))
    cut = [one_hop(edges, torch.nonzero(assign == part).flatten(), num_nodes) for part in assign.unique().tolist()]
    assert_close(by_parts(model, x, cut), model(x, edges).detach())


def test_wrong_degrees_would_be_seen(cuts: Any) -> None:
    """What the degrees of the whole graph are for: with those that a part shows, the comparison fails."""
    graph, model = graph_of("plain"), model_of("GCN")
    cut = [
        (n_id, num_owned, replace(local, in_degree=torch.diff(local.pattern.indptr).float()))
        for n_id, num_owned, local in cuts["plain", "random"]
    ]
    with pytest.raises(AssertionError):
        assert_close(by_parts(model, graph.x, cut), by_pyg(model, graph, False))


# --- layers ----------------------------------------------------------------------------------


def test_a_layer_is_the_output_of_its_norm() -> None:
    graph, model = graph_of("plain"), model_of("GAT", norm="batch_norm", act="elu", jk="cat", heads=2)
    seen: list[Tensor] = []
    handles = [norm.register_forward_hook(lambda _, inputs, out: seen.append(out)) for norm in model.norms]
    logits = model(graph.x, graph.edge_index)
    for handle in handles:
        handle.remove()
    found, layers = run_model(model, graph.x, LocalGraph.from_edge_index(graph.edge_index, 60), (1, 2, 3))
    torch.testing.assert_close(found, logits)
    for layer, z in layers.items():
        torch.testing.assert_close(z, seen[layer - 1])


def test_with_act_first_only_dropout_is_left_to_activate() -> None:
    stack = as_layers(model_of("GCN", act_first=True, norm="batch_norm"))
    z = torch.tensor([[-1.0, 2.0]])
    assert stack is not None
    assert torch.equal(stack.activate(1, z), z)
    assert torch.equal(as_layers(model_of("GCN")).activate(1, z), z.relu())  # type: ignore[union-attr]


def test_the_view_leaves_the_module_as_it_is() -> None:
    model, graph = model_of("GCN"), graph_of("plain")
    before = list(model.state_dict())
    calls: list[int] = []
    model.convs[1].register_forward_hook(lambda _, inputs, out: calls.append(out.size(1)))
    forward_layers(model, graph.x, LocalGraph.from_edge_index(graph.edge_index, 60))
    assert list(model.state_dict()) == before == list(pyg.GCN(6, 8, 3, 4).state_dict())
    assert calls == [8], "hooks of a convolution run"
    assert not any("forward" in module.__dict__ for module in model.modules())
    torch.testing.assert_close(model(graph.x, graph.edge_index), by_pyg(model, graph, False))


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_are_those_of_pyg(name: str) -> None:
    graph, model = graph_of("plain"), model_of(name, jk="cat", norm="layer_norm", norm_kwargs={"mode": "node"})
    model(graph.x, graph.edge_index).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    logits, _ = forward_layers(model, graph.x, LocalGraph.from_edge_index(graph.edge_index, 60))
    logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("jk", [None, "cat"])
def test_dropout_draws_once_per_layer_as_in_pyg(jk: str | None) -> None:
    graph, model = graph_of("plain"), model_of("GCN", jk=jk, dropout=0.5).train()
    torch.manual_seed(7)
    expected = model(graph.x, graph.edge_index)
    torch.manual_seed(7)
    found, _ = forward_layers(model, graph.x, LocalGraph.from_edge_index(graph.edge_index, 60))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FAMILY)
def test_an_empty_batch_runs_every_parameter(name: str) -> None:
    model, batch = model_of(name, norm="batch_norm", dropout=0.5).train(), empty_batch(6, 4, "multiclass")
    logits, _ = run_model(model, batch.x, batch.graph)
    logits.sum().backward()
    assert logits.shape == (0, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


# --- from the configuration ------------------------------------------------------------------


def test_depth_and_width_come_from_layers_and_hidden() -> None:
    model = build_model(config_of("GAT", 4, heads=2, jk="cat", norm="batch_norm"), 6, 4)
    assert (model.num_layers, model.hidden_channels, model.out_channels) == (4, 8, 4)


def test_depth_and_width_may_be_given_among_args_alone() -> None:
    config = ModelConfig(kind="torch_geometric.nn:GCN", args={"num_layers": 3, "hidden_channels": 16})
    assert (config.layers, config.hidden) == (3, 16)
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
    assert build_model(config, 6, 4).hidden_channels == 16


@pytest.mark.parametrize(
    ("beside", "args", "message"),
    [
        ({"layers": 2}, {"num_layers": 3}, "layers is 2 but args.num_layers is 3; keep one of them"),
        ({"hidden": 8}, {"hidden_channels": 9}, "hidden is 8 but args.hidden_channels is 9; keep one of them"),
        ({"heads": 4}, {}, "heads is for built-in models; give torch_geometric.nn:GAT what it takes under args"),
        ({"norm": "batch"}, {}, "norm is for built-in models"),
        ({"dropout": 0.5}, {}, "dropout is for built-in models"),
    ],
)
def test_contradictions_are_refused(beside: dict[str, Any], args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"kind": "torch_geometric.nn:GAT", **beside, "args": args})


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("GAT", {"heads": 3}, "Ensure that the number of output channels .*adjust model.args"),
        ("GCN", {"norm": "batchnorm9"}, "batchnorm9.*adjust model.args"),
        ("GCN", {"head": 3}, r"args \['head', 'hidden_channels', 'num_layers'\].*adjust model.args"),
        ("PNA", {}, r"PNA needs deg, .*\(got None\); give it under model.args, or leave it out"),
        ("PNA", {"deg": "many"}, r"PNA needs deg, .*\(got many\)"),
        ("PNA", {"deg": []}, "PNA needs deg"),
        ("PNA", {"deg": {"-7": 1, "2": 3}}, "PNA needs deg"),
    ],
)
def test_what_pyg_cannot_build_is_said_in_one_sentence(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(config_of(name, **args), 6, 4)
    assert "\n" not in str(caught.value)


def test_pna_takes_the_degrees_of_the_graph_and_is_rebuilt_without_it() -> None:
    config = resolve_model(config_of("PNA"), META)
    stored = ModelConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    model, again = build_model(config, 6, 4), build_model(stored, 6, 4)
    aggregation = model.convs[0].aggr_module
    assert float(aggregation.avg_deg_lin) == pytest.approx((2 * 10 + 4 * 30 + 7 * 3) / 48)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert torch.equal(aggregation.avg_deg_log, again.convs[0].aggr_module.avg_deg_log)
    listed = build_model(config_of("PNA", deg=[5, 0, 10, 0, 30, 0, 0, 3]), 6, 4)
    assert torch.equal(aggregation.avg_deg_lin, listed.convs[0].aggr_module.avg_deg_lin)


def test_degrees_that_are_given_are_kept_and_other_models_get_none() -> None:
    assert resolve_model(config_of("PNA", deg=[0, 1]), META).args["deg"] == [0, 1]
    assert resolve_model(config_of("GCN"), META) == config_of("GCN")
    assert resolve_model(ModelConfig(kind="gcn"), META) == ModelConfig(kind="gcn")


# --- what cannot go layer by layer -----------------------------------------------------------


class OwnForward(pyg.GCN):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x, edge_index) + x.mean()


class NoWeights(pyg.GCN):
    supports_edge_weight = False


def test_reasons_are_named() -> None:
    assert why_not_layered(OwnForward(6, 8, 2, 4)) == "OwnForward has a forward of its own"
    assert "GCNConv with aggr='max', which is not a sum" in why_not_layered(model_of("GCN", aggr="max"))
    flow = why_not_layered(model_of("GraphSAGE", flow="target_to_source"))
    assert "SAGEConv with flow='target_to_source', which reads out-edges" in flow
    assert why_not_layered(model_of("GCN")) == ""
    assert isinstance(as_layers(model_of("GCN")), BasicGnnLayers)
    assert not is_layered(OwnForward(6, 8, 2, 4))


def test_a_model_that_ignores_weights_cannot_use_weighted_degrees() -> None:
    graph, model = graph_of("weights"), NoWeights(6, 8, 2, 4).eval()
    local = LocalGraph.from_edge_index(graph.edge_index, 60, graph.edge_weight)
    with pytest.raises(ModelError, match="set supports_edge_weight = True in the model's class, or prepare the graph"):
        forward_layers(model, graph.x, local)
