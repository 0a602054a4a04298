"""Outputs of modules by dotted path: found, recorded, stored, and refused where they mean nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from infer_worlds import PLAIN_KIND, World, assert_close, whole
from torch import Tensor, nn

from gkd_dist.config import InferConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.infer.plan import KNOWLEDGE, Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.infer.taps import check_taps, owned_rows, probe_taps, recording, tap_layers
from gkd_dist.models.layered import as_layers

MakeWorld = Callable[..., World]


class Stack(nn.Module):
    """Two dense layers, one of them with a module that runs in both, and a readout."""

    num_layers = 2
    readout_layers = (1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.lins = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.shared, self.idle, self.out = nn.Identity(), nn.Identity(), nn.Linear(4, 3)

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        out: Tensor = self.lins[layer - 1](self.shared(h))
        return out

    def activate(self, layer: int, z: Tensor) -> Tensor:
        return z.relu()

    def readout(self, outputs: dict[int, Tensor]) -> Tensor:
        out: Tensor = self.out(torch.cat([outputs[1], outputs[2]], 1))
        return out


def probe(*taps: str) -> dict[str, int]:
    model = Stack()
    layers = as_layers(model)
    assert layers is not None
    return probe_taps(model, layers, taps, torch.ones(3, 2), LocalGraph.from_edge_index(torch.ones(2, 0).long(), 3))


def test_each_tap_has_its_layer() -> None:
    assert probe("lins.0", "lins.1", "out") == {"lins.0": 1, "lins.1": 2, "out": KNOWLEDGE}


def test_taps_without_one_place_are_refused() -> None:
    with pytest.raises(ModelError, match="shared runs in layer 1, layer 2; name one that runs in a single layer"):
        probe("shared")
    with pytest.raises(ModelError, match="idle does not run in inference; remove it from"):
        probe("idle")
    with pytest.raises(ModelError, match="runs in the readout, layer 2"):
        tap_layers({KNOWLEDGE: {"a"}, 2: {"a"}}, ["a"])


def test_near_misses_of_a_tap_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"names 'lin.0', which is no module of the Stack; .*lins\.0"):
        check_taps(Stack(), ["lin.0"])


def test_hooks_are_gone_afterwards() -> None:
    model = Stack()
    with recording(model, ["out"]) as recorded:
        model.out(torch.ones(1, 4))
    model.out(torch.ones(1, 4))
    assert len(recorded["out"]) == 1
    assert not model.out._forward_hooks


def test_only_rows_of_nodes_are_kept() -> None:
    assert owned_rows({"a": [torch.arange(8.0).view(4, 2)]}, 3, 4, "layer 1")["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ModelError, match=r"the module a gives \[7, 2\] in layer 1, expected one row for each of 4"):
        owned_rows({"a": [torch.ones(7, 2)]}, 3, 4, "layer 1")
    with pytest.raises(ModelError, match="the module a runs 2 times in layer 1"):
        owned_rows({"a": [torch.ones(4, 2)] * 2}, 3, 4, "layer 1")
    with pytest.raises(ModelError, match="the module a gives tuple"):
        owned_rows({"a": [(1, 2)]}, 3, 4, "layer 1")


@pytest.mark.parametrize("tile_edges", [2_000_000, 20])
def test_stored_taps_are_those_of_a_forward_over_the_whole_graph(
    make_world: MakeWorld, exact: InferConfig, tile_edges: int
) -> None:
    world = make_world()
    storage, model = world.model("gcn", layers=3)
    taps = ("convs.0.lin", "norms.1", "convs.2")
    settings = exact.model_copy(update={"tile_edges": tile_edges})
    graph, out = world.cut(3), world.storage("k")
    found = infer_nodes(storage, graph, out, Wants(taps=taps), settings, fingerprint="f" * 64)
    with recording(model, taps) as recorded, torch.no_grad():
        logits = model(world.graph.x, world.graph.edge_index)
    assert_close(whole(graph, out, found, "logits"), logits)
    for tap in taps:
        assert_close(whole(graph, out, found, f"taps.{tap}"), recorded[tap][0])


def test_taps_alone_need_no_logits(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, (storage, _) = world.cut(2), world.model("sage", layers=3)
    wants = Wants(logits=False, taps={"convs.0"})
    found = infer_nodes(storage, graph, world.storage("k"), wants, exact, fingerprint="f" * 64)
    assert {tensor.name for part in found.parts for tensor in part.tensors} == {"taps.convs.0"}


def test_models_without_layers_have_taps_too(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, out = world.cut(3, halo_hops=2), world.storage("k")
    storage, model = world.model(PLAIN_KIND, layers=2)
    options = {"fingerprint": "f" * 64, "allow_code": [PLAIN_KIND]}
    found = infer_nodes(storage, graph, out, Wants(taps={"lin"}), exact, **options)  # type: ignore[arg-type]
    assert_close(whole(graph, out, found, "taps.lin"), model.lin(world.graph.x).detach())


def test_what_follows_in_place_does_not_change_a_tap() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    with recording(model, ["0"]) as recorded, torch.no_grad():
        model(torch.randn(50, 2))
    assert recorded["0"][0].min() < 0
