"""What is refused of a student before the teacher works, and what a dry run says of it."""

from __future__ import annotations

from typing import Any

import pytest

from gkd_dist.config import Config
from gkd_dist.config_file import parse_config
from gkd_dist.errors import ConfigError, ModelError, StudentError
from gkd_dist.preflight import check_student, describe_student

YAML = """
run: /data/run
graph: {source: {kind: synthetic, num_nodes: 100}}
teacher: {model: {kind: gcn, hidden: 5, layers: 3}}
student: {model: {kind: gcn, hidden: 4}}
losses: [{kind: label}]
"""
META: dict[str, Any] = {
    "num_features": 6,
    "num_classes": 4,
    "task": "multiclass",
    "halo_hops": 1,
    "in_degree_histogram": {"0": 3, "4": 7},
}


def config(kind: str, losses: str = "[{kind: label}]", **model: Any) -> Config:
    text = ", ".join(f"{key}: {value}" for key, value in {"kind": f"'{kind}'", **model}.items())
    return parse_config(YAML.replace("[{kind: label}]", losses).replace("{kind: gcn, hidden: 4}", f"{{{text}}}"))


@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GAT", "GIN", "PNA", "EdgeCNN"])
def test_models_of_pyg_fit(name: str) -> None:
    given = config(f"torch_geometric.nn:{name}", "[{kind: lsp}, {kind: fitnet}]", hidden=8, args="{norm: batch_norm}")
    assert check_student(given, META).layered
    assert describe_student(given, META) == (
        f"student: torch_geometric.nn:{name}, 2 layers; {name} runs layer by layer: exact"
    )


def test_what_is_said_before_there_is_a_graph() -> None:
    assert describe_student(config("gat"), None) == "student: gat, 2 layers; runs layer by layer"
    assert describe_student(config("mlp", layers=1), META) == "student: mlp, 1 layer; runs layer by layer"
    assert describe_student(config("user_models:Plain"), None).endswith("how it runs is known after partition")


def test_a_class_without_layers_runs_on_its_halo() -> None:
    line = describe_student(config("user_models:Plain"), META)
    assert "runs as a whole on each part, with its halo of 1 hop (k-hop mode" in line
    assert line.endswith("exact, it looks 1 hop far")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (config("user_models:Plain", "[{kind: lsp}]"), ModelError, r"give it num_layers, .* or remove the lsp loss"),
        (config("user_models:Plain", "[{kind: fitnet}]"), ModelError, "or remove the fitnet loss"),
        (
            config("user_models:Greedy"),
            StudentError,
            "Greedy cannot run on a batch without nodes",
        ),
        (
            config("torch_geometric.nn:GCN", args="{norm: graph_norm}"),
            ModelError,
            "GraphNorm.*use norm: batch_norm",
        ),
        (
            config("gcn", "[{kind: fitnet, projection: none}]"),
            ConfigError,
            "64 wide .* 5; set projection",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given: Config, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_student(given, META)
