"""From ``model:`` of a configuration to a module: built-in kinds and users' classes."""

from __future__ import annotations

import pytest
import torch
import user_models
from graphs import in_edges, path
from torch import Tensor

from gkd_dist.config import BUILT_IN_MODELS, ModelConfig
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.build import build_model, run_model
from gkd_dist.models.layered import LayeredModel, is_layered


def user(name: str, layers: int = 2, **args: object) -> ModelConfig:
    return ModelConfig(kind=f"user_models:{name}", layers=layers, args=args)


@pytest.mark.parametrize("kind", BUILT_IN_MODELS)
def test_built_in_kinds_are_layered(kind: str) -> None:
    model = build_model(ModelConfig(kind=kind, hidden=4, layers=3), 3, 2)
    assert isinstance(model, LayeredModel)
    assert is_layered(model)
    assert model.num_layers == 3


# --- users' classes --------------------------------------------------------------------------


def test_a_plain_class_gets_its_args_and_runs() -> None:
    graph = path()
    model = build_model(user("Plain", scale=2.0), 3, 2)
    assert isinstance(model, user_models.Plain)
    assert model.scale == 2.0
    logits, layers = run_model(model, graph.x, in_edges(graph))
    torch.testing.assert_close(logits, model(graph.x, graph.edge_index))
    assert layers == {}


def test_a_plain_class_gets_edge_weights_in_the_order_of_the_edges() -> None:
    graph = path(edge_weight=torch.arange(1.0, 11.0))
    model = build_model(user("Plain"), 3, 2)
    logits, _ = run_model(model, graph.x, in_edges(graph))
    torch.testing.assert_close(logits, model(graph.x, graph.edge_index, graph.edge_weight))


class Attributed(user_models.Plain):
    def forward(self, x: Tensor, edge_index: Tensor, *, edge_attr: Tensor | None = None) -> Tensor:  # type: ignore[override]
        weight = None if edge_attr is None else edge_attr.sum(1)
        return super().forward(x, edge_index, weight)


class Renamed(user_models.Plain):
    def forward(self, x: Tensor, edge_index: Tensor, strength: Tensor | None = None) -> Tensor:
        return super().forward(x, edge_index, strength)


class Bare(user_models.Plain):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, edge_index)


def test_a_plain_class_gets_of_the_edges_what_its_forward_takes() -> None:
    graph, random = path(), torch.Generator().manual_seed(0)
    weight, attr = torch.rand(10, generator=random), torch.rand(10, 2, generator=random)
    local = LocalGraph.from_edge_index(graph.edge_index, 6, weight, attr)
    torch.manual_seed(0)
    reference = user_models.Plain(3, 2)
    expected = {
        user_models.Plain: reference(graph.x, graph.edge_index, weight),
        Renamed: reference(graph.x, graph.edge_index, weight),
        Attributed: reference(graph.x, graph.edge_index, attr.sum(1)),
        Bare: reference(graph.x, graph.edge_index),
    }
    for cls, logits in expected.items():
        model = cls(3, 2)
        model.load_state_dict(reference.state_dict())
        torch.testing.assert_close(run_model(model, graph.x, local)[0], logits)


def test_a_layered_class_gives_its_layers() -> None:
    graph = path()
    model = build_model(user("Layered", width=7), 3, 2)
    logits, layers = run_model(model, graph.x, in_edges(graph), layers=(1, 2))
    assert is_layered(model)
    assert layers[1].shape == (6, 7)
    assert layers[2] is logits
    torch.testing.assert_close(layers[1], model.first(graph.x, in_edges(graph)))  # before the tanh
    torch.testing.assert_close(logits, model.second(layers[1].tanh(), in_edges(graph)))


def test_layers_of_a_plain_class_are_refused() -> None:
    graph, model = path(), build_model(user("Plain"), 3, 2)
    with pytest.raises(ModelError, match=r"Plain has no layers to name; give it num_layers, .*or drop the loss terms"):
        run_model(model, graph.x, in_edges(graph), layers=(1,))


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (user("Plain", depth=3), r"args \['depth'\]: .*signature is \(in_channels: .*scale: .*adjust model.args"),
        (user("Plain", in_channels=3), r"args \['in_channels'\].*adjust model.args"),
        (user("linear_function"), "gave a Tensor; it must give a torch.nn.Module"),
        (user("Layered", layers=3), "has 2 layers, the configuration says 3; set layers=2"),
        (user("Missing"), r"could not be imported: .*Missing.*folder of user_models on PYTHONPATH"),
        (ModelConfig(kind="no_such.module:Net"), "could not be imported: .*put the folder of no_such on PYTHONPATH"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said_in_one_sentence(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(config, 3, 2)
    assert "\n" not in str(caught.value)
