"""Students of every kind through the whole flow: trained, evaluated, exported, loaded and used for predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import gkd_dist
from gkd_dist.storage import Storage

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parents[2]
LABELS = [{"kind": "label"}, {"kind": "kd"}]
LAYERS = [
    *LABELS,
    {"kind": "lsp", "sigma": "median", "outer_softmax": False, "fan_out": 3},
    {"kind": "fitnet", "teacher_layer": 1, "student_layer": 1},
]


def gkd(*arguments: object) -> str:
    """Runs the command in a process of its own; its standard output."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gkd_dist", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_config(folder: Path, model: dict[str, object], losses: list[dict[str, object]], fan_out: object) -> Path:
    """A run of two epochs on a small graph in this process."""
    config = {
        "run": str(folder / "run"),
        "graph": {
            "source": {"kind": "synthetic", "num_nodes": 600, "num_classes": 4, "num_features": 8},
            "split": {"kind": "per_class", "train": 10, "val": 10},
        },
        "partition": {"num_parts": 3},
        "teacher": {"model": {"kind": "sage", "hidden": 12}, "train": {"epochs": 3}},
        "infer": {"num_actors": 0},
        "student": {"model": model, "alone": False},
        "losses": losses,
        "distill": {"launcher": "inline", "num_workers": 1, "epochs": 2, "zero_stage": 2, "fan_out": fan_out},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("model", "losses", "fan_out"),
    [
        (
            {"kind": "torch_geometric.nn:GAT", "hidden": 6, "args": {"norm": "batch_norm", "dropout": 0.2}},
            LAYERS,
            [4, 3],
        ),
        pytest.param({"kind": "gin", "hidden": 6, "norm": "batch"}, LAYERS, [-1, 3], marks=pytest.mark.slow),
        pytest.param(
            {"kind": "torch_geometric.nn:PNA", "hidden": 6, "args": {"jk": "cat", "norm": "batch_norm"}},
            LAYERS,
            [4, 3],
            marks=pytest.mark.slow,
        ),
        pytest.param({"kind": "user_models:Layered"}, LAYERS, [4, 3], marks=pytest.mark.slow),
        pytest.param({"kind": "user_models:Plain"}, LABELS, None, marks=pytest.mark.slow),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_from_the_data_set_to_a_prediction(tmp_path, model, losses, fan_out):
    path, kind = write_config(tmp_path, model, losses, fan_out), model["kind"]
    gkd("run", path)
    plan = gkd("run", path, "--dry-run")
    assert all(f"{stage:<9}  skip" in plan for stage in ("distill", "evaluate", "export"))
    assert ("runs as a whole" if "Plain" in kind else "runs layer by layer") in plan
    assert ("embeddings.1" in plan) == (losses is LAYERS)

    student = gkd_dist.load_student(str(tmp_path / "run"), allow_code=[kind])
    exported = gkd_dist.load_model(str(tmp_path / "run/export"), allow_code=[kind])
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in student.state_dict().items())
    num_params = sum(parameter.numel() for parameter in student.parameters())
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["models"]["distilled"]
    assert metrics["num_params"] == num_params
    summary = Storage.open(str(tmp_path / "run/students/distilled")).read_json("model.json")["meta"]["summary"]
    assert (summary["extra"]["num_head_params"] > 0) == (losses is LAYERS)
    assert student(torch.randn(5, 8), torch.tensor([[0, 1, 2], [1, 2, 3]])).shape == (5, 4)
    assert "600 nodes in" in gkd("predict", path, "--out", tmp_path / "predictions")
