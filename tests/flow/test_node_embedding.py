"""A student with a learned vector for each node, through every stage: ZeRO 3, exact evaluation, export, predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flow_runs import BASE, STAGES, Job, make_job

import gkd_dist
from gkd_dist.data.sources import load_graph
from gkd_dist.models.io import load_model
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage

EMBEDDED = BASE.replace("kind: gcn, hidden: 8,", "kind: gcn, hidden: 8, node_embedding: 5,").replace(
    "launcher: inline,", "launcher: inline, zero_stage: 3,"
)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run; tests read it."""
    job = make_job(tmp_path_factory.mktemp("embedded"), EMBEDDED)
    outcome = job.gkd("run")
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES
    return job


def whole_graph_logits(job: Job, model: torch.nn.Module) -> torch.Tensor:
    graph = load_graph(job.load().graph, job.load().seed)
    with torch.no_grad():
        logits: torch.Tensor = model(graph.x, graph.edge_index)
    return logits


def test_what_was_exported_is_the_student_of_every_node(embedded: Job) -> None:
    student = gkd_dist.load_student(str(embedded.run))
    assert student.embedding.table.weight.shape == (400, 5)
    alone = gkd_dist.load_student(str(embedded.run), "alone")  # began with the same vectors
    assert not torch.allclose(student.embedding.table.weight, alone.embedding.table.weight)
    exported = load_model(str(embedded.run / "export"))
    assert "a learned vector of 5 numbers for each of the 400 nodes" in (embedded.run / "export/README.md").read_text()
    assert torch.equal(whole_graph_logits(embedded, student), whole_graph_logits(embedded, exported))


def test_predictions_are_those_on_the_whole_graph(embedded: Job, tmp_path: Path) -> None:
    outcome = embedded.gkd("predict", "--out", str(tmp_path), "--format", "safetensors")
    assert outcome.code == 0, outcome.err
    expected = whole_graph_logits(embedded, gkd_dist.load_student(str(embedded.run)))
    storage = Storage.open(str(tmp_path))
    for entry in Manifest.load(storage, "predictions").parts:
        table = read_shard(storage, entry)
        torch.testing.assert_close(table["logits"], expected[table["n_id"]], rtol=1e-4, atol=1e-5)


def test_another_graph_is_refused(embedded: Job, tmp_path: Path) -> None:
    other = make_job(tmp_path / "other", EMBEDDED.replace("num_nodes: 400", "num_nodes: 390"))
    outcome = embedded.gkd("predict", "--graph", str(other.config), "--out", str(tmp_path / "out"))
    assert outcome.code == 3, outcome.err
    assert "learned vector for each of the 400 nodes" in outcome.complaint
    assert "this graph has 390; use that graph, or train a model without node_embedding" in outcome.complaint
