"""What fewer hops than exactness needs take from a student: counted, against what really differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gkd_dist.config import Config, ModelConfig
from gkd_dist.graph import LocalGraph
from gkd_dist.inspect_measures import measure, structure_terms
from gkd_dist.little_halo import what_is_approximate, wrong_nodes
from gkd_dist.models.build import build_model
from gkd_dist.models.layered import forward_layers
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import KnowledgeStore
from gkd_dist.stream.order import plan_units
from gkd_dist.stream.units import UnitLoader, part_costs
from tests.distributed.cases import uneven_graph, uneven_world
from tests.graphs import both_ways

DEGREE = 2


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return uneven_world(tmp_path_factory.mktemp("world"), 1, DEGREE)


def config(layers: int, student_layer: int = 1, **distill: Any) -> Config:
    return Config.model_validate(
        {
            "run": "r",
            "graph": {"source": {"kind": "synthetic"}},
            "partition": {"halo_hops": 1},
            "teacher": {"model": {"kind": "sage", "hidden": 8}, "checkpoint": "t"},
            "student": {"model": {"kind": "gcn", "layers": layers}},
            "losses": [
                {"kind": "label"},
                {
                    "kind": "lsp",
                    "sigma": 1.0,
                    "outer_softmax": False,
                    "teacher_layer": 1,
                    "student_layer": student_layer,
                },
            ],
            "distill": distill,
        }
    )


def line(storage: Storage, of: Config) -> str:
    knowledge = storage.child("knowledge")
    known = [(of, knowledge, Manifest.load(knowledge, "knowledge"))]
    return what_is_approximate(of, GraphStore.open(storage.child("graph")), known)


def test_wrong_nodes_by_hand():
    """Nodes 0 to 3 of a path 0 - 1 - 2 - 3 - 4, of which 3 is a halo node without its in-edges."""
    whole = LocalGraph.from_edge_index(both_ways([(0, 1), (1, 2), (2, 3), (3, 4)]), 5)
    part = LocalGraph.from_edge_index(torch.tensor([[1, 0, 2, 1, 3], [0, 1, 1, 2, 2]]), 4)
    part.in_degree = whole.in_degree[:4]
    found = [torch.nonzero(wrong).flatten().tolist() for wrong in wrong_nodes(part, 3, 3)]
    assert found == [[], [3], [2, 3], [1, 2, 3]]


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("parts_per_unit", [1, 2])
def test_as_many_nodes_as_really_differ(storage, layers, parts_per_unit):
    graph, _ = uneven_graph(DEGREE)
    store = GraphStore.open(storage.child("graph"))
    torch.manual_seed(0)
    model = build_model(ModelConfig(kind="gcn", hidden=8, layers=layers, norm="none", act="tanh"), 5, 3).eval()
    loader = UnitLoader(store, None, plan_units(store.num_parts, parts_per_unit, part_costs(store.manifest)))
    with torch.no_grad():
        whole, _ = forward_layers(model, graph.x, LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes))
        differ = 0
        for batch in map(loader.load, range(len(loader.units))):
            logits, _ = forward_layers(model, batch.x, batch.graph)
            gap = (logits - whole[batch.n_id])[: batch.num_owned].abs().amax(1)
            differ += int((gap > 1e-6).sum())
    assert differ > 0
    found = line(storage, config(layers, parts_per_unit=parts_per_unit))
    assert f"outputs of {differ / graph.num_nodes:.1%} of the nodes are approximate" in found


def test_what_is_lost_of_the_structure_next_to_the_features_is_what_lies_across_the_cut(storage):
    """At layer 1 with one hop, the far ends of cut edges are wrong and no others: the lost mass of `gkd inspect`."""
    of = config(2)
    knowledge = KnowledgeStore(storage.child("knowledge"), Manifest.load(storage.child("knowledge"), "knowledge"))
    store = GraphStore.open(storage.child("graph"))
    expected = measure(store, knowledge, structure_terms(knowledge.manifest, of), range(store.num_parts))[0]
    lost = expected.to_json()["lost_mass"]
    assert 0.1 < lost < 1
    assert f"loss lsp: {lost:.1%} of the teacher's local structure meets such outputs" in line(storage, of)
    assert line(storage, of).startswith("partition.halo_hops is 1, exact training needs 2: ")
    assert line(storage, of).endswith("set partition.halo_hops=auto or distill.halo=exchange for exact training")


def test_deeper_layers_lose_more(storage):
    def share(layer: int) -> float:
        return float(line(storage, config(3, layer)).split("loss lsp: ")[1].split("%")[0])

    assert share(1) < share(2) < share(3)


def test_exact_training_says_nothing(storage, tmp_path: Path):
    assert line(storage, config(1, 1, parts_per_unit="all")) == ""
    assert line(storage, config(3, 2, halo="exchange")) == ""
    enough = uneven_world(tmp_path, 3, DEGREE)
    assert line(enough, config(3, 2)) == ""


def test_only_some_of_many_units_are_read(storage, monkeypatch):
    monkeypatch.setattr("gkd_dist.little_halo._MAX_UNITS", 2)
    assert ", measured in 2 of 5 units" in line(storage, config(2))
