"""What `docs/models.md` shows must run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
import yaml
from graphs import in_edges, path

from gkd_dist.config import ModelConfig
from gkd_dist.models.build import build_model
from gkd_dist.models.layered import forward_layers
from gkd_dist.models.probe import check_model
from gkd_dist.models.pyg_convs import why_not_local

PAGE = (Path(__file__).parents[3] / "docs/models.md").read_text()


def block(language: str) -> str:
    """The first fenced block in that language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_of_the_protocol_is_exact() -> None:
    names: dict[str, Any] = {}
    exec(compile(block("python"), "docs/models.md", "exec"), names)  # our own page
    model, graph = names["TwoLayers"](3, 2).eval(), path()
    assert check_model(model, 3).layered
    logits, layers = forward_layers(model, graph.x, in_edges(graph), (1,))
    assert (logits.shape, layers[1].shape) == ((6, 2), (6, 16))


def test_the_example_of_pyg_builds_and_takes_its_checkpoint() -> None:
    config = ModelConfig.model_validate(yaml.safe_load(block("yaml"))["teacher"]["model"])
    model = build_model(config, 6, 4).eval()
    theirs = pyg.GAT(6, 64, 3, 4, heads=4, norm="batch_norm", jk="cat")
    model.load_state_dict(theirs.state_dict())
    assert check_model(model, 6).layered


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+Conv)`", PAGE.split("## k-hop mode")[0]))))
def test_convolutions_of_the_table_are_local(name: str) -> None:
    """Each is tried on a part of a tiny graph: PyG's own code must need no more than in-edges."""
    attributes = {"GINEConv": 6, "NNConv": 3, "CGConv": 3}
    options: dict[str, Any] = {
        "EdgeConv": {"nn": torch.nn.Linear(12, 4)},
        "GINConv": {"nn": torch.nn.Linear(6, 4)},
        "GINEConv": {"nn": torch.nn.Linear(6, 4)},
        "CGConv": {"channels": 6, "dim": 3},
        "NNConv": {"in_channels": 6, "out_channels": 4, "nn": torch.nn.Linear(3, 24)},
        "PNAConv": {"aggregators": ["mean"], "scalers": ["linear"], "deg": torch.tensor([1, 4]), **_io()},
        "GeneralConv": {"in_edge_channels": None, **_io()},
    }.get(name, _io())
    conv = getattr(pyg, name)(**options)
    assert why_not_local(conv) == ""

    class One(pyg.models.basic_gnn.BasicGNN):
        supports_edge_weight, supports_edge_attr = name == "GCNConv", name in attributes

        def init_conv(self, in_channels: int, out_channels: int, **_: object) -> torch.nn.Module:
            return conv

    assert check_model(One(6, 4, 1, 4).eval(), 6, num_edge_features=attributes.get(name, 0)).layered


def _io() -> dict[str, int]:
    return {"in_channels": 6, "out_channels": 4}
