"""Layered models: equal to plain PyG stacks, and exact on a part with enough halo."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
import user_models
from graphs import path
from infer_worlds import make_graph
from torch import Tensor, nn

from gkd_dist.config import ModelConfig, PartitionConfig
from gkd_dist.errors import ModelError
from gkd_dist.graph import Graph, LocalGraph
from gkd_dist.models.layered import LayeredModel, as_layers, forward_layers, why_not_layered
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore, features, local_graph
from gkd_dist.storage import Storage

KINDS = ("gcn", "sage", "gat", "gin", "mlp")


def model_of(kind: str, in_channels: int = 6, out_channels: int = 4, seed: int = 0, **options: object) -> LayeredModel:
    """A model in eval mode with parameters that are not their initial zeros and ones."""
    heads = {"heads": 2} if kind == "gat" else {}
    config = ModelConfig.model_validate({"kind": kind, "hidden": 5, "layers": 3, "norm": "none", **heads, **options})
    torch.manual_seed(seed)
    model = LayeredModel(config, in_channels, out_channels).eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(0.1 * torch.rand_like(value))
    return model


# --- against PyG -----------------------------------------------------------------------------


def pyg_conv(ours: nn.Module, kind: str) -> nn.Module:
    """PyG's own convolution with the weights of ``ours``."""
    if kind == "gin":
        theirs: nn.Module = pyg.GINConv(ours.nn, train_eps=True)
    elif kind == "gat":
        theirs = pyg.GATConv(ours.in_channels, ours.out_channels, heads=ours.heads)
    else:
        theirs = {"gcn": pyg.GCNConv, "sage": pyg.SAGEConv}[kind](ours.in_channels, ours.out_channels)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def pyg_norm(ours: nn.Module, norm: str, width: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    theirs = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # BatchNorm1d also counts batches
    return theirs.eval()


def pyg_outputs(model: LayeredModel, kind: str, norm: str, act: str, x: Tensor, edge_index: Tensor) -> list[Tensor]:
    """``z_1``, ``z_2``, ... of the stack as one would write it with PyG."""
    outputs, h = [], x
    for layer in range(model.num_layers):
        z = pyg_conv(model.convs[layer], kind)(h, edge_index)
        if layer + 1 < model.num_layers:
            if model.residual:
                z = z + h @ model.skips[layer].weight.t()
            z = pyg_norm(model.norms[layer], norm, z.size(1))(z)
        outputs.append(z)
        h = getattr(F, act)(z)
    return outputs


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin"])
def test_every_layer_equals_pyg(kind: str, norm: str, residual: bool) -> None:
    graph = make_graph()
    model = model_of(kind, norm=norm, residual=residual, act="elu")
    expected = pyg_outputs(model, kind, norm, "elu", graph.x, graph.edge_index)
    logits, layers = model(graph.x, graph.edge_index, layers=(1, 2, 3))
    assert [z.size(1) for z in layers.values()] == [model.convs[1].in_channels if kind != "gin" else 5] * 2 + [4]
    for layer, z in layers.items():
        torch.testing.assert_close(z, expected[layer - 1], msg=lambda m, n=layer: f"layer {n}: {m}")
    assert layers[3] is logits


def test_edge_weights_equal_pyg() -> None:
    graph = make_graph(weighted=True)
    model = model_of("gcn", layers=1)
    expected = pyg_conv(model.convs[0], "gcn")(graph.x, graph.edge_index, graph.edge_weight)
    torch.testing.assert_close(model(graph.x, graph.edge_index, graph.edge_weight), expected)


def test_order_of_edges_does_not_matter() -> None:
    graph, model = make_graph(), model_of("gat")
    shuffled = graph.edge_index[:, torch.randperm(graph.num_edges)]
    assert torch.equal(model(graph.x, graph.edge_index), model(graph.x, shuffled))


def test_input_dropout_and_dropout_are_off_in_eval_mode() -> None:
    graph, model = make_graph(), model_of("gat", dropout=0.5, input_dropout=0.5)
    once = model(graph.x, graph.edge_index)
    assert torch.equal(once, model(graph.x, graph.edge_index))
    model.train()
    assert not torch.equal(once, model(graph.x, graph.edge_index))


# --- the protocol ----------------------------------------------------------------------------


def test_layers_are_given_before_activation() -> None:
    graph, model = path(), model_of("gcn", in_channels=3, layers=2)
    local = LocalGraph.from_edge_index(graph.edge_index, 6)
    logits, layers = model(graph.x, local, layers=(1,))
    assert set(layers) == {1}
    z = model.forward_layer(1, graph.x, local)
    assert torch.equal(layers[1], z)
    assert torch.equal(model.activate(1, z), z.relu())
    assert torch.equal(logits, model.forward_layer(2, z.relu(), local))


def test_without_layers_the_result_is_a_tensor() -> None:
    graph, model = path(), model_of("gcn", in_channels=3)
    assert isinstance(model(graph.x, graph.edge_index), Tensor)


@pytest.mark.parametrize("layer", [0, -2, 4])
def test_a_layer_that_is_not_there_is_named(layer: int) -> None:
    graph, model = path(), model_of("gcn", in_channels=3)
    with pytest.raises(ModelError, match=rf"layers 1 to 3 \(got {layer}\)"):
        model(graph.x, graph.edge_index, layers=(1, layer))


class Skip(user_models.Layered):
    """Logits from both layers."""

    readout_layers = (1, 2)

    def readout(self, outputs: dict[int, Tensor]) -> Tensor:
        """[n, out_channels]."""
        return outputs[2] + outputs[1].sum(1, keepdim=True)


def test_the_protocol_without_a_readout_gives_the_last_layer() -> None:
    stack = as_layers(user_models.Layered(3, 2))
    assert stack is not None
    assert (stack.num_layers, stack.readout_layers) == (2, (2,))
    z = torch.ones(4, 2)
    assert stack.readout({2: z}) is z


def test_a_readout_joins_layers_that_nobody_asked_for() -> None:
    graph, model = path(), Skip(3, 2).eval()
    local = LocalGraph.from_edge_index(graph.edge_index, 6)
    logits, layers = forward_layers(model, graph.x, local, (2,))
    first = model.forward_layer(1, graph.x, local)
    assert set(layers) == {2}
    torch.testing.assert_close(logits, layers[2] + first.sum(1, keepdim=True))
    assert as_layers(model) is model


def test_half_a_readout_is_refused() -> None:
    model = user_models.Layered(3, 2)
    model.readout_layers = (1, 2)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="Layered has half a readout; give it readout as well, or neither"):
        as_layers(model)


@pytest.mark.parametrize("read", [(), (0, 1), (2, 3)])
def test_a_readout_of_layers_that_are_not_there_is_refused(read: tuple[int, ...]) -> None:
    model = Skip(3, 2)
    model.readout_layers = read  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"readout_layers of Skip is .* the model has layers 1 to 2; name layers that"):
        as_layers(model)


def test_what_a_model_lacks_is_named() -> None:
    plain = user_models.Plain(3, 2)
    assert as_layers(plain) is None
    assert why_not_layered(plain) == (
        "Plain does not follow the layer protocol, it lacks num_layers, forward_layer and activate"
    )
    plain.num_layers, plain.activate = 2, plain.forward  # type: ignore[assignment]
    assert why_not_layered(plain) == "Plain does not follow the layer protocol, it lacks forward_layer"
    graph = path()
    with pytest.raises(ModelError, match=r"it lacks forward_layer; run it as a whole, or give it the members"):
        forward_layers(plain, graph.x, LocalGraph.from_edge_index(graph.edge_index, 6))


def test_an_mlp_ignores_the_graph() -> None:
    graph, model = make_graph(), model_of("mlp", norm="layer", residual=True)
    none = torch.empty(2, 0, dtype=torch.int64)
    assert torch.equal(model(graph.x, graph.edge_index), model(graph.x, none))
    torch.testing.assert_close(model(graph.x, none)[7:9], model(graph.x[7:9], none))
    assert not model.uses_graph
    assert model_of("gcn").uses_graph


# 5 features, hidden 8, 3 classes, 2 layers, LayerNorm (16 parameters, 32 of two heads) between them
GOLDEN = {
    "gcn": (5 * 8 + 8) + 16 + (8 * 3 + 3),
    "sage": (2 * 5 * 8 + 8) + 16 + (2 * 8 * 3 + 3),
    "gat": (5 * 16 + 16 + 16 + 16) + 32 + (16 * 3 + 3 + 3 + 3),
    "gin": (5 * 8 + 8 + 8 * 8 + 8 + 1) + 16 + (8 * 3 + 3 + 3 * 3 + 3 + 1),
    "mlp": (5 * 8 + 8) + 16 + (8 * 3 + 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_number_of_parameters(kind: str, residual: bool) -> None:
    model = model_of(kind, 5, 3, hidden=8, layers=2, norm="layer", residual=residual)
    skip = 5 * (16 if kind == "gat" else 8)
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[kind] + residual * skip


def test_a_single_layer_has_neither_norm_nor_skip() -> None:
    model = model_of("gcn", 5, 3, layers=1, norm="batch", residual=True)
    assert sum(p.numel() for p in model.parameters()) == 5 * 3 + 3
    assert list(model.buffers()) == []


# --- a part with enough halo is exact (C2a) --------------------------------------------------


def cut(graph: Graph, name: str, halo_hops: int = 3) -> GraphStore:
    storage = Storage.open(f"memory://layered-{name}")
    config = PartitionConfig(method="random", num_parts=3)
    build_graph_store(graph, storage, config, halo_hops=halo_hops, seed=0, fingerprint="f")
    return GraphStore.open(storage)


def on_part(store: GraphStore, index: int) -> tuple[Tensor, LocalGraph, Tensor]:
    """Features and edges of a part with its halo, and global ids of its owned nodes."""
    part, num_owned = store.part(index), store.manifest.parts[index].counts["num_owned"]
    x = torch.cat([features(part, "x", store.num_features), features(part, "x_halo", store.num_features)])
    graph = local_graph(part)
    graph.num_owned = num_owned
    return x, graph, part["n_id"][:num_owned]


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize(("kind", "weighted"), [*((kind, False) for kind in KINDS), ("gcn", True)])
def test_owned_rows_do_not_know_how_the_graph_was_cut(kind: str, norm: str, weighted: bool) -> None:
    graph = make_graph(weighted=weighted)
    store, model = cut(graph, f"{kind}-{norm}-{weighted}"), model_of(kind, norm=norm, residual=True)
    expected, inner = model(graph.x, graph.edge_index, graph.edge_weight, layers=(1,))
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for index in range(store.num_parts):
        x, local, owned = on_part(store, index)
        logits, layers = model(x, local, layers=(1,))
        torch.testing.assert_close(logits[: owned.numel()], expected[owned])
        torch.testing.assert_close(layers[1][: owned.numel()], inner[1][owned])
        logits[: owned.numel()].square().sum().backward()
    for whole, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, whole, rtol=1e-4, atol=1e-4)


def test_one_hop_too_few_is_not_exact() -> None:
    graph, model = make_graph(), model_of("sage")
    expected = model(graph.x, graph.edge_index)
    store = cut(graph, "too-few", halo_hops=2)
    with torch.no_grad():
        parts = [(model(x, local), owned) for x, local, owned in (on_part(store, i) for i in range(store.num_parts))]
    assert max((found[: owned.numel()] - expected[owned]).abs().max().item() for found, owned in parts) > 1e-3


# --- low precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_close_and_keeps_its_type(kind: str) -> None:
    graph, model = make_graph(), model_of(kind, norm="layer")
    expected = model(graph.x, graph.edge_index)
    found = model.bfloat16()(graph.x.bfloat16(), graph.edge_index)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert (found.float() - expected).abs().max().item() < 0.05 * expected.abs().max().item()
