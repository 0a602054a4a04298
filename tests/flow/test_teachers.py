"""Several teachers over one graph store, and teachers that read other features than the student."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flow_runs import BASE, STAGES, Job, gkd, make_job
from infer_worlds import assert_close, whole

from gkd_dist import layout, stages
from gkd_dist.data.sources import load_graph
from gkd_dist.distill.task import build_objective, teacher_wants
from gkd_dist.errors import ModelError
from gkd_dist.graph import Graph
from gkd_dist.losses import edge_scores, kd_loss, lsp_loss
from gkd_dist.models.io import load_teacher
from gkd_dist.stream.ensemble import Ensemble
from gkd_dist.stream.units import UnitLoader

TWO = BASE.replace(
    """teacher:
  model: {{kind: sage, hidden: 16, norm: none, dropout: 0.2}}
  train: {{epochs: 8, patience: 0, checkpoint_every: 3, threads: 1}}
""",
    """teachers:
  - name: wide
    model: {{kind: sage, hidden: 16, norm: none, dropout: 0.2}}
    train: {{epochs: 8, patience: 0, checkpoint_every: 3, threads: 1}}
  - name: deep
    model: {{kind: gcn, hidden: 6, layers: 3, norm: none}}
    train: {{epochs: 4, patience: 0, threads: 1}}
""",
)
THIRD = TWO.replace(
    "infer:",
    """  - name: third
    model: {{kind: gin, hidden: 4, norm: none}}
    train: {{epochs: 2, patience: 0, threads: 1}}
infer:""",
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run with two teachers; tests read it."""
    job = make_job(tmp_path_factory.mktemp("two"), TWO)
    outcome = job.gkd("run")
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES
    return job


def graph_of(job: Job) -> Graph:
    config = job.load()
    return load_graph(config.graph, config.seed)


def test_every_teacher_and_their_mean_has_a_row(two: Job) -> None:
    models = two.session().run.read_json(layout.METRICS)["models"]
    assert set(models) == {"wide", "deep", "ensemble", "distilled", "alone"}
    graph = graph_of(two)
    with torch.no_grad():
        logits = [load_teacher(str(two.run), name=name)(graph.x, graph.edge_index) for name in ("wide", "deep")]
    mean = (logits[0] + logits[1]) / 2
    right = mean.argmax(1)[graph.test_mask] == graph.y[graph.test_mask]
    assert models["ensemble"]["accuracy"]["test"] == pytest.approx(float(right.float().mean()))
    assert models["ensemble"]["num_params"] == models["wide"]["num_params"] + models["deep"]["num_params"]
    assert (two.run / layout.one_teacher("deep") / layout.MODEL_JSON).exists()
    assert two.gkd("verify").code == 0


def test_loss_and_gradient_equal_those_of_live_teachers_on_the_whole_graph(two: Job) -> None:
    session, graph = two.session(), graph_of(two)
    task = stages.student_tasks(session)[0]
    assert isinstance(task.knowledge, Ensemble)
    store = stages.open_graph(session)
    loader = UnitLoader(
        store, task.knowledge, [tuple(range(store.num_parts))], teacher_wants(task.losses, task.teacher_layers)
    )
    batch, objective = loader.load(0), build_objective(task)
    n_id = batch.n_id[: batch.num_owned]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(graph.num_nodes, 3, generator=generator).requires_grad_()
    z = torch.randn(graph.num_nodes, 8, generator=generator).requires_grad_()
    sums = objective.sums(batch, logits[batch.n_id], {1: z[batch.n_id]})
    found = (objective.weights(0) * sums / objective.counts(batch)).sum()

    with torch.no_grad():
        live = {name: load_teacher(str(two.run), name=name) for name in ("wide", "deep")}
        outputs = {
            name: model(graph.x, graph.edge_index, layers=(model.num_layers - 1,)) for name, model in live.items()
        }
    mean = (outputs["wide"][0] + outputs["deep"][0]) / 2
    train = graph.train_mask & (graph.y >= 0)
    expected = torch.nn.functional.cross_entropy(logits[train], graph.y[train]) + kd_loss(logits, mean)
    for name, (_, layers) in outputs.items():
        scores = edge_scores(layers[live[name].num_layers - 1], graph.edge_index)
        median = (
            stages.open_knowledge(session).stores[name][1].meta["scores"][f"{live[name].num_layers - 1}.sqeuclidean"]
        )
        expected = expected + 0.15 * lsp_loss(
            z, graph.edge_index, teacher_scores=scores, sigma=1.0, teacher_sigma=median["median"] / 2,
            outer_softmax=False,
        )  # fmt: skip
    assert sorted(n_id.tolist()) == list(range(graph.num_nodes))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found, [logits, z]), torch.autograd.grad(expected, [logits, z]), strict=True
    ):
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def test_a_third_teacher_leaves_the_others_alone(two: Job, tmp_path: Path) -> None:
    job = make_job(tmp_path, THIRD)
    shutil.copytree(two.run, job.run)
    before = {path: path.stat().st_mtime_ns for path in job.run.glob("teachers/*/model.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in job.run.glob("knowledge/*/part-*")}
    outcome = job.gkd("run")
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES[1:]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(job.run.glob("knowledge/third-*"))) == 1
    assert "third" in job.session().run.read_json(layout.METRICS)["models"]


def test_a_run_that_reads_one_of_two_learns_what_a_run_with_that_one_learns(tmp_path: Path) -> None:
    named = TWO.replace("{{kind: kd}}", "{{kind: kd, teacher: deep}}").replace(
        "kind: lsp,", "kind: lsp, teacher: deep,"
    )
    one = TWO[: TWO.index("  - name: wide")] + TWO[TWO.index("  - name: deep") :]
    one = one.replace("teachers:\n  - name: deep\n    model:", "teacher:\n  name: deep\n  model:")
    one = one.replace("    train: {{epochs: 4", "  train: {{epochs: 4")
    weights = []
    for folder, text in (("two", named), ("one", one)):
        job = make_job(tmp_path / folder, text)
        outcome = job.gkd("run")
        assert outcome.code == 0, outcome.err
        weights.append((job.run / "students/distilled/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


TWINS = (
    TWO.replace("name: deep", "name: twin")
    .replace("{{kind: gcn, hidden: 6, layers: 3, norm: none}}", "{{kind: sage, hidden: 16, norm: none, dropout: 0.2}}")
    .replace("{{epochs: 4, patience: 0, threads: 1}}", "{{epochs: 8, patience: 0, threads: 1}}\n    seed: 7")
    .replace("{{kind: kd}}", "{{kind: kd, teacher: wide}}")
    .replace("kind: lsp,", "kind: lsp, teacher: wide,")
    .replace("dtype: fp32", "dtype: fp32, logits: 2")
)


def test_the_largest_logits_have_no_mean_and_a_teacher_that_nobody_reads_changes_no_student(tmp_path: Path) -> None:
    job = make_job(tmp_path, TWINS)
    outcome = job.gkd("run")
    assert outcome.code == 0, outcome.err
    assert "which have no mean: there is no row for the ensemble" in outcome.err
    models = job.session().run.read_json(layout.METRICS)["models"]
    assert set(models) == {"wide", "twin", "distilled", "alone"}
    assert all(row["agreement"] is None for row in models.values())
    assert models["distilled"]["lsp_kl"] > 0
    weights = [(job.run / layout.one_teacher(name) / layout.MODEL_WEIGHTS).read_bytes() for name in ("wide", "twin")]
    assert weights[0] != weights[1], "teachers of one kind differ by their seed"
    again = job.gkd("run", "teachers.1.seed=8")
    assert (again.code, again.done) == (0, ["teach", "infer", "evaluate", "report"]), again.err


def test_what_is_stored_of_a_run_takes_overrides_of_each_teacher(two: Job) -> None:
    outcome = gkd("verify", str(two.run), "teachers.0.train.threads=2", "--recompute", "1")
    assert outcome.code == 0, outcome.err
    assert re.findall(r"part \d of (\w+) recomputed: equal bits", outcome.out) == ["wide", "deep"]


@pytest.mark.parametrize(("name", "complaint"), [(None, "has several teachers"), ("wode", "has no teacher 'wode'")])
def test_one_of_several_is_loaded_by_name(two: Job, name: str | None, complaint: str) -> None:
    with pytest.raises(ModelError, match=rf"{complaint}; name one of deep, wide, e\.g\. load_teacher"):
        load_teacher(str(two.run), name=name)


def test_a_teacher_reads_features_of_its_own(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    graph = graph_of(job)
    rng = np.random.default_rng(0)
    text = np.concatenate([graph.x.numpy(), rng.standard_normal((graph.num_nodes, 5), dtype=np.float32)], 1)
    np.save(tmp_path / "text.npy", text)
    named = ("graph.features={text: " + str(tmp_path / "text.npy") + "}", "teacher.features=text")
    outcome = job.gkd("run", *named)
    assert outcome.code == 0, outcome.err
    teacher = load_teacher(str(job.run))
    store = stages.open_graph(job.session(*named))
    with torch.no_grad():
        expected = teacher(torch.from_numpy(text), graph.edge_index)
    storage, manifest = stages.open_knowledge(job.session(*named))

    assert_close(whole(store, storage, manifest, "logits"), expected)
    metrics = job.session().run.read_json(layout.METRICS)["models"]
    assert metrics["teacher"]["num_params"] > metrics["distilled"]["num_params"]
    assert job.gkd("verify", "--recompute", "1", *named).code == 0


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["losses.1.teacher=deap"], r"losses.1.teacher: the run has no 'deap' .*did you mean 'deep'"),
        (["teachers.1.name=wide"], "every one needs a name of its own"),
        (["infer.logits=2"], "set infer.logits=all, or name a teacher in every kd loss"),
        (["teachers.1.features=text"], r"teachers\.1\.features: graph\.features has no 'text'"),
        (["teachers.1.name=distilled"], r"teachers\.1\.name: 'distilled' is what results call something else"),
        (
            ["losses.2.teacher_layer=3"],
            r"losses\.2\.teacher_layer: teacher wide: layer 3 does not exist in a model of 2",
        ),
    ],
)
def test_wrong_teachers_are_refused(tmp_path: Path, overrides: list[str], complaint: str) -> None:
    outcome = make_job(tmp_path, TWO).gkd("run", *overrides)
    assert outcome.code == 2
    assert re.search(complaint, outcome.complaint), outcome.complaint


def test_dry_run_lists_what_is_stored_of_each(two: Job) -> None:
    found: Any = two.gkd("run", "--dry-run", "--json").json
    stored = next(one for one in found if one["stage"] == "infer")["knowledge"]["teachers"]
    assert set(stored) == {"wide", "deep"}
    assert {kind["name"] for kind in stored["deep"]["kinds"]} == {"logits", "scores.2.sqeuclidean"}
    text = two.gkd("run", "--dry-run").out
    assert "knowledge of wide:" in text
    assert "knowledge of deep:" in text
