"""A whole run with parts that stay on their ranks: one stored hop, deep students, and the same command on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flow_runs import BASE, ON_RAY, Job, gkd_process, make_job
from safetensors.torch import load_file

from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage

EXCHANGE = ("distill.halo=exchange", "distill.checkpoint_layers=true", "student.model.layers=4")


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("inline"), BASE)
    outcome = job.gkd("run", *EXCHANGE)
    assert outcome.code == 0, outcome.err
    assert "approximate" not in outcome.err
    return job


def test_one_hop_is_stored_and_the_run_is_finished(inline: Job) -> None:
    assert GraphStore.open(Storage.open(str(inline.run / "graph"))).manifest.meta["halo_hops"] == 1
    again = inline.gkd("run", *EXCHANGE)
    assert (again.code, again.done) == (0, [])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_train_the_same_student(inline: Job, tmp_path: Path) -> None:
    job = make_job(tmp_path, BASE)
    outcome = gkd_process("run", str(job.config), *EXCHANGE, *ON_RAY)
    assert outcome.code == 0, outcome.err
    for name in ("distilled", "alone"):
        found, expected = (load_file(run / f"students/{name}/model.safetensors") for run in (job.run, inline.run))
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["distill.units_per_step=2"], "with halo exchange every step is the whole graph (got units_per_step 2)"),
        (["distill.parts_per_unit=2"], "with halo exchange each rank merges the parts it has (got parts_per_unit 2)"),
        (["student.model.dropout_mask=unit"], "masks of a unit would depend on the number of workers"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, overrides: list[str], complaint: str) -> None:
    outcome = make_job(tmp_path, BASE).gkd("run", "distill.halo=exchange", *overrides)
    assert outcome.code == 2
    assert complaint in outcome.complaint


def test_a_student_without_layers_is_refused_before_the_teacher_works(tmp_path: Path) -> None:
    text = BASE.replace("{{kind: gcn, hidden: 8, norm: none, dropout: 0.1}}", "{{kind: 'user_models:Plain'}}")
    text = "\n".join(line for line in text.splitlines() if "kind: lsp" not in line)
    outcome = make_job(tmp_path, text).gkd("run", "distill.halo=exchange", "student.model.layers=1")
    assert outcome.code == 3
    assert "distill.halo is exchange, which works between layers, but Plain" in outcome.complaint
    assert outcome.done == ["partition"]
