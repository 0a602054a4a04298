"""Students with a learned vector per node: lookups by hand, any cut, one graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gkd_dist.config import ModelConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.build import build_model, resolve_model, run_model
from gkd_dist.models.probe import check_model, layer_widths
from gkd_dist.models.tiny import random_graph

META = {"num_nodes": 24}
KINDS = ["gcn", "sage", "gat", "gin", "mlp"]


def model_of(kind: str = "gcn", num_nodes: int = 24, **options: object) -> torch.nn.Module:
    config = ModelConfig.model_validate({"kind": kind, "hidden": 6, "node_embedding": 3, **options})
    torch.manual_seed(0)
    return build_model(resolve_model(config, {"num_nodes": num_nodes}), 4, 2).eval()


def test_the_vector_of_a_node_stands_beside_its_features() -> None:
    model = model_of()
    graph = LocalGraph.from_edge_index(torch.tensor([[0], [1]]), 3)
    graph.n_id = torch.tensor([7, 0, 23])
    x = torch.randn(3, 4)
    found = model.embedding(x, graph)
    assert torch.equal(found, torch.cat([x, model.embedding.table.weight[[7, 0, 23]]], 1))


def test_the_vector_of_a_node_stands_in_place_of_its_features() -> None:
    model = model_of(node_embedding_mode="replace")
    tiny = random_graph(4, False, 0)
    assert torch.equal(model.embedding(tiny.x, tiny.graph), model.embedding.table.weight)
    assert model.convs[0].in_channels == 3
    assert torch.equal(model(tiny.x, tiny.graph), model(torch.zeros(24, 4), tiny.graph))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_graph_needs_no_numbers(kind: str) -> None:
    model, tiny = model_of(kind), random_graph(4, False, 0)
    assert torch.equal(model(tiny.x, tiny.graph.edge_index), model(tiny.x, tiny.graph))


@pytest.mark.parametrize("kind", KINDS)
def test_owned_rows_of_a_part_are_those_of_the_whole(kind: str) -> None:
    model, tiny = model_of(kind), random_graph(4, False, 0)
    owned = torch.tensor([5, 2, 11, 17])
    part, nodes = tiny.part(owned, 2)
    found, _ = run_model(model, part.x, part.graph)
    assert nodes[:4].tolist() == owned.tolist()
    torch.testing.assert_close(found[:4], model(tiny.x, tiny.graph)[owned])
    wrong, _ = run_model(model, part.x, replace(part.graph, n_id=torch.arange(nodes.numel())))
    assert (wrong[:4] - found[:4]).abs().max() > 1e-3


@pytest.mark.parametrize("num_nodes", [5, 24, 1000])
def test_it_passes_the_checks_of_a_model_on_graphs_of_any_size(num_nodes: int) -> None:
    model = model_of(num_nodes=num_nodes)
    assert check_model(model, 4).layered
    assert layer_widths(model, 4) == {1: 6, 2: 2}


def test_another_graph_is_refused() -> None:
    model = model_of()
    with pytest.raises(ModelError, match=r"each of the 24 nodes .* this graph has 3; use that graph"):
        model(torch.randn(3, 4), torch.tensor([[0], [1]]))


def test_the_size_is_that_of_the_graph() -> None:
    config = ModelConfig(kind="gcn", node_embedding=3)
    assert resolve_model(config, META).num_nodes == 24
    assert resolve_model(ModelConfig(kind="gcn"), META) == ModelConfig(kind="gcn")
    with pytest.raises(ConfigError, match=r"num_nodes is 25, but the graph has 24 nodes; leave num_nodes out"):
        resolve_model(ModelConfig(kind="gcn", node_embedding=3, num_nodes=25), META)
    with pytest.raises(ConfigError, match="needs to know how many there are; set num_nodes"):
        build_model(config, 4, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "torch_geometric.nn:GCN", "node_embedding": 3}, "node_embedding is for built-in models"),
        ({"kind": "tests.user_models:Any", "node_embedding": 3}, r"graph\.global_ids\(\), see docs/models\.md"),
        (
            {"kind": "gcn", "node_embedding_mode": "replace"},
            "node_embedding_mode says how node_embedding works, which is not set",
        ),
        ({"kind": "gcn", "num_nodes": 3}, "num_nodes says how node_embedding works, which is not set"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig.model_validate(options)
