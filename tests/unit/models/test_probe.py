"""What a trial on a tiny graph finds out about a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
import user_models
from infer_worlds import TwoHops
from torch import Tensor, nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gkd_dist.config import BUILT_IN_MODELS, ModelConfig
from gkd_dist.errors import ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.build import build_model, run_model
from gkd_dist.models.probe import ModelCheck, check_model, distance, layer_widths


class Whole(nn.Module):
    """A convolution inside a class that knows nothing of layers."""

    def __init__(self, conv: nn.Module, depth: int = 1) -> None:
        super().__init__()
        self.conv, self.depth = conv, depth

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = self.conv(x, edge_index)
        return x


class Cheb(BasicGNN):
    """A `BasicGNN` of a convolution that looks further than one hop."""

    supports_edge_weight, supports_edge_attr = True, False

    def init_conv(self, in_channels: int, out_channels: int, **options: Any) -> nn.Module:
        return pyg.ChebConv(in_channels, out_channels, K=2)


# --- what passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", BUILT_IN_MODELS)
def test_built_in_models_run_layer_by_layer(kind: str, weighted: bool) -> None:
    model = build_model(ModelConfig(kind=kind, layers=3, dropout=0.5, norm="batch"), 6, 3).eval()
    assert check_model(model, 6, weighted) == ModelCheck("LayeredModel", True)


@pytest.mark.parametrize(
    ("model", "num_edge_features"),
    [
        (pyg.GCN(6, 8, 3, 4, jk="lstm", dropout=0.5), 0),
        (pyg.GAT(6, 8, 3, 4, heads=2, edge_dim=3, jk="cat", norm="batch_norm"), 3),
        (pyg.GAT(6, 8, 3, 4, heads=2, v2=True), 3),
        (pyg.GraphSAGE(6, 8, 2, 4, aggr=["mean", "std"], act_first=True, norm="batch_norm"), 0),
        (user_models.Layered(6, 4), 0),
    ],
)
def test_layered_models_of_others(model: nn.Module, num_edge_features: int) -> None:
    check = check_model(model.eval(), 6, num_edge_features=num_edge_features)
    assert check.layered
    assert check.sentence(1) == f"{type(model).__name__} runs layer by layer: exact"


def test_nothing_of_the_model_or_of_the_random_state_changes() -> None:
    model = pyg.GCN(6, 8, 2, 4, norm="batch_norm").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    check_model(model, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


# --- how far a model looks that runs as a whole ----------------------------------------------


@pytest.mark.parametrize(
    ("model", "hops"),
    [
        (user_models.Plain(6, 4), 1),
        (TwoHops(6, 4), 2),
        (Whole(pyg.SAGEConv(6, 6), 3), 3),
        (Whole(pyg.GCNConv(6, 6)), 2),  # one hop further: it normalises by the degree of the neighbour
        (Whole(pyg.GCNConv(6, 6), 3), 4),
        (Whole(pyg.SAGEConv(6, 6), 7), 7),  # a small influence is still one
    ],
)
def test_hops_are_measured(model: nn.Module, hops: int) -> None:
    check = check_model(model.eval(), 6)
    assert (check.layered, check.hops) == (False, hops)
    assert check.exact(hops)
    assert not check.exact(hops - 1)


def test_the_sentence_says_mode_reason_and_what_to_do() -> None:
    check = check_model(TwoHops(6, 4).eval(), 6)
    start = "TwoHops runs as a whole on each part, with its halo of {} (k-hop mode, because {}): "
    reason = "TwoHops does not follow the layer protocol, it lacks num_layers, forward_layer and activate"
    assert check.sentence(2) == start.format("2 hops", reason) + "exact, it looks 2 hops far"
    assert check.sentence(1) == start.format("1 hop", reason) + (
        "approximate, it looks 2 hops far; set partition.halo_hops=2 for exact results and run again"
    )


def test_a_convolution_that_is_not_local_is_named() -> None:
    check = check_model(Cheb(6, 8, 2, 4).eval(), 6)
    assert not check.layered
    assert check.reason.startswith("its convs.0 is a ChebConv, which may need more than the in-edges of a node")
    assert check.hops == 4  # two hops, and the degrees of the neighbours, twice


class Faint(Whole):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x, edge_index) + 1e-3 * x.mean()


def test_a_faint_influence_from_afar_is_told_not_refused() -> None:
    check = check_model(Faint(pyg.SAGEConv(6, 4)).eval(), 6)
    assert check.hops is None
    assert not check.exact(16)
    assert check.sentence(16).endswith("approximate, it looks more than 16 hops far")


# --- what is refused -------------------------------------------------------------------------


class AlwaysDrops(Whole):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return F.dropout(super().forward(x, edge_index))


class Positional(Whole):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.size(0)).unsqueeze(1), edge_index)


class Centred(Whole):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x - x.mean(0), edge_index)


class Pooled(Whole):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x, edge_index).mean(0, keepdim=True)


class Crashing(Whole):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match\nand much more")


class LocalDegrees(user_models.Layered):
    """Normalises by the degrees it sees, which for halo nodes are not those of the graph."""

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        counts = torch.diff(graph.pattern.indptr).unsqueeze(1)
        return super().forward_layer(layer, h / (1 + counts), graph)


class MixingActivation(user_models.Layered):
    def activate(self, layer: int, z: Tensor) -> Tensor:
        return z if layer == 0 else z - z.mean(0)


class MixingReadout(user_models.Layered):
    readout_layers = (1, 2)

    def readout(self, outputs: dict[int, Tensor]) -> Tensor:
        return outputs[2] + outputs[1].mean()


class ShortLayer(user_models.Layered):
    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        return super().forward_layer(layer, h, graph)[0]


SAGE_CONV = pyg.SAGEConv(6, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (AlwaysDrops(SAGE_CONV), "AlwaysDrops gives other outputs when it is run again .*and leave x as it is$"),
        (Positional(SAGE_CONV), "Positional depend on the order of nodes or edges .*no input that is the number"),
        (pyg.GraphSAGE(6, 8, 2, 4, aggr="lstm"), r"likely convs.0.aggr_module \(LSTMAggregation\)"),
        (Whole(pyg.SAGEConv(6, 4, aggr="lstm")), r"likely conv.aggr_module \(LSTMAggregation\)"),
        (Centred(SAGE_CONV), "Centred at a node depend on nodes more than 16 hops away .*whole graph$"),
        (Pooled(SAGE_CONV), r"Pooled gave shape \[1, 4\] for 24 nodes; its forward must return .* one row per node$"),
        (Crashing(SAGE_CONV), "Crashing failed on a graph of 24 nodes with 6 features: RuntimeError: shapes do"),
        (LocalDegrees(6, 4), r"forward_layer\(1\) of LocalDegrees needs more than the in-edges .*graph.in_degree"),
        (MixingActivation(6, 4), r"activate\(1\) of MixingActivation mixes nodes"),
        (MixingReadout(6, 4), "readout of MixingReadout mixes nodes"),
        (ShortLayer(6, 4), r"forward_layer\(1\) of ShortLayer gave shape \[4\] for 24 nodes"),
        (pyg.GAT(6, 8, 2, 4, edge_dim=3), "GATConv reads 3 attributes per edge, the graph has 0; set edge_dim to null"),
        (pyg.GCN(5, 8, 2, 4), r"GCN failed on a graph of 24 nodes with 6 features: RuntimeError"),
        (pyg.GCN(6, 8, 2, 4, norm="graph_norm"), r"norms.0 \(GraphNorm\) normalises over the whole graph"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_on_parts_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check_model(model.eval(), 6)
    assert "\n" not in str(caught.value)


def test_a_model_in_train_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Plain is in train mode .*call model.eval\(\) first"):
        check_model(user_models.Plain(6, 4), 6)


def test_another_number_of_edge_attributes_is_refused() -> None:
    deg, names = torch.tensor([1, 5]), ["mean"]
    model = pyg.PNA(6, 8, 2, 4, deg=deg, aggregators=names, scalers=["identity"], edge_dim=3).eval()
    with pytest.raises(ModelError, match="PNAConv reads 3 attributes per edge, the graph has 2; set edge_dim to 2"):
        check_model(model, 6, num_edge_features=2)


def test_a_view_that_is_not_pygs_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pyg.GCN(6, 8, 2, 4).eval()
    monkeypatch.setattr(BasicGNN, "forward", lambda self, x, edge_index, **edges: x[:, :4])
    with pytest.raises(ModelError, match="the layers of GCN do not give what its own forward does"):
        check_model(model, 6)


# --- helpers ---------------------------------------------------------------------------------


def test_distance_is_relative_and_takes_nan_for_equal() -> None:
    big = torch.tensor([100.0, torch.nan])
    assert distance(big, big) == 0
    assert distance(torch.tensor([101.0]), torch.tensor([100.0])) == pytest.approx(0.01)
    assert distance(torch.tensor([0.1]), torch.tensor([0.0])) == pytest.approx(0.1)
    assert distance(torch.ones(2), torch.ones(3)) == torch.inf
    assert distance(torch.empty(0), torch.empty(0)) == 0


def test_widths_are_those_of_the_layers() -> None:
    assert layer_widths(pyg.GAT(6, 8, 3, 4, heads=2, jk="cat").eval(), 6) == {1: 8, 2: 8, 3: 8}
    assert layer_widths(pyg.GCN(6, 8, 3, 4).eval(), 6) == {1: 8, 2: 8, 3: 4}
    gat = build_model(ModelConfig(kind="gat", hidden=5, heads=3, layers=3), 6, 4).eval()
    assert layer_widths(gat, 6) == {1: 15, 2: 15, 3: 4}
    assert layer_widths(user_models.Layered(6, 4, width=7).eval(), 6) == {1: 7, 2: 4}
    assert layer_widths(TwoHops(6, 4).eval(), 6) == {}


class _InPlace(nn.Module):
    """Two dense layers whose activation writes into what it was given."""

    num_layers = 2

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.lins = nn.ModuleList([nn.Linear(in_channels, 4), nn.Linear(4, 3)])

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        out: Tensor = self.lins[layer - 1](h)
        return out

    def activate(self, layer: int, z: Tensor) -> Tensor:
        return z if layer == 0 else z.relu_()


def test_activations_in_place_are_refused_in_the_protocol() -> None:
    with pytest.raises(ModelError, match=r"activate\(1\) of _InPlace changes its input in place"):
        check_model(_InPlace(5).eval(), 5)


def test_activations_in_place_of_pyg_leave_the_layers_as_they_are() -> None:
    torch.manual_seed(0)
    model = pyg.GCN(5, 8, 3, 2, act="relu", act_kwargs={"inplace": True}, jk="cat").eval()
    twin = pyg.GCN(5, 8, 3, 2, jk="cat").eval()
    twin.load_state_dict(model.state_dict())
    edge_index = torch.randint(0, 20, (2, 60))
    graph, x = LocalGraph.from_edge_index(edge_index, 20), torch.randn(20, 5)
    with torch.no_grad():
        found, expected = (run_model(one, x, graph, (1, 2, 3)) for one in (model, twin))
    torch.testing.assert_close(found[0], expected[0])
    for layer in (1, 2, 3):
        torch.testing.assert_close(found[1][layer], expected[1][layer])
        assert found[1][layer].min() < 0
