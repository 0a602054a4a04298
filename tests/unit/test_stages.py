"""Whole runs in this process: teachers and students with features of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flow_runs import BASE, STAGES, Job, gkd, make_job

from gkd_dist.models.io import read_model_document
from gkd_dist.storage import Storage

FEATURES = BASE.replace("num_features: 8}}\n", "num_features: 8}}\n  features: {{wide: {run}-wide.npy}}\n")


def job_with_features(folder: Path, num_nodes: int = 400) -> Job:
    job = make_job(folder, FEATURES)
    np.save(f"{job.run}-wide.npy", np.random.default_rng(0).normal(size=(num_nodes, 13)))
    return job


def in_channels(job: Job, folder: str) -> tuple[int, str | None]:
    document = read_model_document(Storage.open(str(job.run / folder)))
    return document["in_channels"], document["features"]


def test_a_teacher_and_a_student_read_features_of_their_own(tmp_path: Path) -> None:
    job = job_with_features(tmp_path)
    first = job.gkd("run", "teacher.features=wide")
    assert (first.code, first.done) == (0, STAGES), first.err
    assert in_channels(job, "teacher") == (13, "wide")
    assert in_channels(job, "students/distilled") == in_channels(job, "export") == (8, None)
    second = job.gkd("run", "teacher.features=wide", "student.features=wide")
    assert (second.code, second.done) == (0, STAGES[3:]), second.err
    assert in_channels(job, "students/distilled") == in_channels(job, "export") == (13, "wide")
    assert "# x [n, 13] of wide, edge_index [2, m]" in (job.run / "export/README.md").read_text()
    out = job.gkd("predict", "teacher.features=wide", "student.features=wide", "--out", str(tmp_path / "p"), "--json")
    assert out.json["num_nodes"] == 400
    models = json.loads((job.run / "metrics.json").read_text())["models"]
    assert models["distilled"]["inference_s"] > 0


@pytest.mark.parametrize(
    ("num_nodes", "overrides", "code", "complaint"),
    [
        (400, ["teacher.features=wode"], 2, "teacher.features: graph.features has no 'wode' (it has wide)"),
        (399, [], 3, "has shape [399, 13], expected [400, f] with f at least 1; give one row per node of the graph"),
    ],
)
def test_wrong_features(num_nodes: int, overrides: list[str], code: int, complaint: str, tmp_path: Path) -> None:
    job = job_with_features(tmp_path, num_nodes)
    outcome = gkd("run", str(job.config), *overrides)
    assert outcome.code == code
    assert complaint in outcome.complaint
