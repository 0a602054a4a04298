"""The exported student: a folder that works on its own, and a card that says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from infer_worlds import PLAIN_KIND, World, make_graph

from gkd_dist import layout, load_model
from gkd_dist.config_file import parse_config
from gkd_dist.errors import ModelError
from gkd_dist.export import export_student, model_card
from gkd_dist.models.io import read_model_document
from gkd_dist.storage import Storage

CONFIG = parse_config("""
run: /data/run
seed: 7
graph: {source: {kind: synthetic}}
teacher: {model: {kind: gat, hidden: 32}}
student: {model: {kind: sage, hidden: 16, layers: 3, norm: batch}}
losses:
  - {kind: label}
  - {kind: lsp, weight: 10, sigma: median, teacher_layer: 1}
distill: {optimizer: adamw, lr: 0.002, epochs: 150}
""")
GRAPH = {
    "name": "Computers",
    "num_nodes": 13752,
    "num_edges": 491722,
    "num_features": 767,
    "num_classes": 10,
    "task": "multiclass",
}
METRICS = {
    "models": {
        "teacher": {
            "metric": "accuracy",
            "accuracy": {"train": 0.98763, "val": 0.9, "test": 0.85},
            "num_params": 123456,
            "agreement": None,
        },
        "distilled": {
            "metric": "accuracy",
            "accuracy": {"train": 1.0, "val": None, "test": 0.84},
            "num_params": 789,
            "agreement": 0.9,
        },
    }
}


# --- the folder ------------------------------------------------------------------------------


def test_an_exported_student_answers_like_the_one_it_was(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    (student, model), out = world.model("sage"), world.storage("out")
    export_student(student, out, "e" * 64)
    found = load_model(out.url)
    assert torch.equal(found(world.graph.x, world.graph.edge_index), model(world.graph.x, world.graph.edge_index))
    assert read_model_document(out)["fingerprint"] == "e" * 64
    assert sorted(out.list()) == [layout.MODEL_JSON, layout.MODEL_WEIGHTS]


def test_a_damaged_student_is_never_exported(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    (student, _), out = world.model("gcn"), world.storage("out")
    student.write(layout.MODEL_WEIGHTS, student.read(layout.MODEL_WEIGHTS)[:-1])
    with pytest.raises(ModelError, match="truncated"):
        export_student(student, out, "e")
    assert out.list() == []


def test_a_users_class_has_to_be_named(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    (student, _), out = world.model(PLAIN_KIND), world.storage("out")
    with pytest.raises(ModelError, match="allow_code"):
        export_student(student, out, "e")
    export_student(student, out, "e", allow_code=[PLAIN_KIND])
    assert Storage.open(out.url).exists(layout.MODEL_JSON)


# --- the card --------------------------------------------------------------------------------


def test_the_card_says_what_was_trained_on_what() -> None:
    card = model_card(CONFIG, GRAPH, METRICS)
    assert card.startswith("# sage student, distilled on Computers\n")
    assert "3 layers, 16 hidden units, norm batch, distilled from a gat teacher" in card
    assert "13,752 nodes, 491,722 directed edges, 767 features, 10 classes (multiclass)." in card
    assert "- adamw, learning rate 0.002, at most 150 epochs, seed 7\n" in card


def test_the_card_lists_losses_with_what_differs_from_the_defaults() -> None:
    card = model_card(CONFIG, GRAPH, METRICS)
    assert "- loss label, weight 1\n" in card
    assert "- loss lsp, weight 10 (sigma median, teacher_layer 1)\n" in card


def test_the_card_has_a_row_per_model() -> None:
    rows = [line for line in model_card(CONFIG, GRAPH, METRICS).splitlines() if line.startswith("|")]
    assert rows[2] == "| teacher | accuracy | 98.76 % | 90.00 % | 85.00 % | 123,456 | - |"
    assert rows[3] == "| distilled | accuracy | 100.00 % | - | 84.00 % | 789 | 90.00 % |"
    assert len({row.count("|") for row in rows}) == 1


def test_the_card_of_a_student_that_was_not_evaluated() -> None:
    assert "\nNot evaluated.\n" in model_card(CONFIG, GRAPH, {})


def test_the_card_names_all_teachers() -> None:
    several = parse_config(
        """
run: /data/run
graph: {source: {kind: synthetic}}
teachers: [{name: one, model: {kind: gat}}, {name: two, model: {kind: sage}}]
student: {model: {kind: gcn}}
losses: [{kind: label}]
"""
    )
    assert "distilled from 2 teachers (gat, sage) with gkd_dist." in model_card(several, GRAPH, METRICS)
