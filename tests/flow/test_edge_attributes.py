"""Edge attributes from a data set through the cut to teacher and student, and back out as predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flow_runs import BASE, STAGES, Job, make_job
from infer_worlds import assert_close, whole
from torch import Tensor

from gkd_dist import stages
from gkd_dist.data.arrays import save_arrays
from gkd_dist.data.sources import load_graph
from gkd_dist.graph import Graph
from gkd_dist.models.io import load_student, load_teacher
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage

SYNTHETIC = "kind: synthetic, num_nodes: 400, num_classes: 3, average_degree: 6, num_features: 8"
ATTRIBUTED = (
    BASE.replace(SYNTHETIC, "kind: arrays, path: {run}-graph.npz")
    .replace(
        "{{kind: sage, hidden: 16, norm: none, dropout: 0.2}}",
        "{{kind: 'torch_geometric.nn:GAT', layers: 2, args: {{hidden_channels: 8, heads: 2, edge_dim: 3}}}}",
    )
    .replace(
        "{{kind: gcn, hidden: 8, norm: none, dropout: 0.1}}",
        "{{kind: 'torch_geometric.nn:GAT', layers: 2, args: {{hidden_channels: 4, edge_dim: 3, v2: true}}}}",
    )
)
ALLOWED = ("torch_geometric.nn:GAT",)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run on a graph whose edges have three attributes, also the reverse ones; tests read it."""
    folder = tmp_path_factory.mktemp("attributed")
    generated = load_graph(make_job(folder / "plain").load().graph, seed=0)
    job = make_job(folder, ATTRIBUTED)
    attributes = np.random.default_rng(0).normal(size=(generated.num_edges, 3)).astype(np.float32)
    data = {**vars(generated), "edge_attr": torch.from_numpy(attributes)}
    save_arrays(f"{job.run}-graph.npz", Graph(**data))
    outcome = job.gkd("run")
    assert (outcome.code, outcome.done) == (0, STAGES), outcome.err
    return job


def graph_of(job: Job) -> Graph:
    return load_graph(job.load().graph, seed=0)


@torch.no_grad()
def forward(model: torch.nn.Module, graph: Graph, edge_attr: Tensor | None) -> Tensor:
    out: Tensor = model(graph.x, graph.edge_index, edge_attr=edge_attr)
    return out


def test_the_teacher_is_exact_and_reads_them(job: Job) -> None:
    session, graph = job.session(), graph_of(job)
    storage, manifest = stages.open_knowledge(session)
    assert isinstance(manifest, Manifest)
    assert isinstance(storage, Storage)
    stored = whole(stages.open_graph(session), storage, manifest, "logits")
    teacher = load_teacher(str(job.run), ALLOWED)
    assert graph.edge_attr is not None
    assert_close(stored, forward(teacher, graph, graph.edge_attr))
    assert (stored - forward(teacher, graph, graph.edge_attr.flip(0))).abs().max() > 1e-3, "they matter"


def test_the_student_is_trained_with_them_and_evaluated_exactly(job: Job) -> None:
    session, graph = job.session(), graph_of(job)
    out = session.student("distilled").child("predictions")
    stored = whole(GraphStore.open(session.graph), out, Manifest.load(out, "knowledge"), "logits")
    assert_close(stored, forward(load_student(str(job.run), allow_code=ALLOWED), graph, graph.edge_attr))


def test_what_needs_them_is_refused_on_a_graph_without(job: Job, tmp_path: Path) -> None:
    dropped = job.gkd("run", f"run={tmp_path}/run", "graph.edge_attr=drop")
    assert dropped.code == 3
    assert "the graph has 0; set edge_dim to null, or use a graph with the attributes" in dropped.complaint
