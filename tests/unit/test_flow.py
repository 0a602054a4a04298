"""Which stages run: decided from what is stored and what the configuration says today."""

from __future__ import annotations

from pathlib import Path

import pytest
from flow_runs import STAGES, Job, make_job

from gkd_dist import flow, layout
from gkd_dist.errors import DataError
from gkd_dist.flow import Decision, decide
from gkd_dist.shards.seal import sealed


def to_run(job: Job, *overrides: str, redo: tuple[str, ...] = ()) -> list[str]:
    """Stages that a run would do."""
    return [decision.stage for decision in decide(job.session(*overrides), redo) if decision.action == "run"]


def test_stages_are_in_the_order_of_the_flow() -> None:
    assert list(flow.NAMES) == STAGES
    for one in flow.STAGES:
        for suffix in ("", "_done", "_fingerprint", "_discard"):
            assert callable(one._function(suffix))


def test_a_finished_run_skips_all(finished: Job) -> None:
    decisions = decide(finished.session())
    assert [decision.action for decision in decisions] == ["skip"] * len(STAGES)
    assert decisions[0] == Decision("partition", "skip", "graph/ is finished and of this configuration")


def test_an_empty_run_does_all_and_says_why(tmp_path: Path) -> None:
    decisions = decide(make_job(tmp_path).session())
    assert [decision.action for decision in decisions] == ["run"] * len(STAGES)
    assert decisions[0].reason == "graph/ is missing, unfinished or of another configuration"
    assert decisions[1].reason.startswith("after partition")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=1", "partition"),
        ("partition.num_parts=2", "partition"),
        ("partition.method=metis", "partition"),
        ("graph.source.noise=0.5", "partition"),
        ("teacher.train.lr=0.1", "teach"),
        ("teacher.model.hidden=8", "teach"),
        ("infer.dtype=fp16", "infer"),
        ("losses.2.kernel=laplacian", "infer"),  # another metric is stored
        ("distill.lr=0.1", "distill"),
        ("losses.1.weight=5", "distill"),
        ("losses.2.sigma=2", "distill"),
        ("student.model.hidden=4", "distill"),
    ],
)
def test_a_change_does_its_stage_and_the_later_ones_again(finished: Job, override: str, first: str) -> None:
    assert to_run(finished, override) == STAGES[STAGES.index(first) :]


@pytest.mark.parametrize(
    "overrides",
    [
        ("distill.num_workers=2", "distill.launcher=ray"),
        ("distill.threads=2", "teacher.train.threads=2", "infer.threads=2"),
        ("infer.num_actors=4", "infer.window=3"),
        ("distill.zero_stage=2",),
        ("distill.prefetch_bytes=1000", "distill.resident_bytes=0", "distill.checkpoint_every=1"),
        ("partition.halo_hops=2",),  # what auto stands for here
        ("storage.retries=1", "ray.timeout_s=5"),
    ],
)
def test_who_does_the_work_and_how_fast_changes_nothing(finished: Job, overrides: tuple[str, ...]) -> None:
    assert to_run(finished, *overrides) == []


@pytest.mark.parametrize("stage", STAGES)
def test_redo_does_a_stage_and_the_later_ones(finished: Job, stage: str) -> None:
    assert to_run(finished, redo=(stage,)) == STAGES[STAGES.index(stage) :]


@pytest.mark.parametrize(
    ("lost", "first"),
    [
        ("graph/manifest.json", "partition"),
        ("teacher/model.json", "teach"),
        ("students/distilled/model.json", "distill"),
        ("students/alone/model.json", "distill"),
        (layout.METRICS, "evaluate"),
        ("export/README.md", "export"),
        (layout.REPORT, "report"),
    ],
)
def test_what_is_lost_is_made_again(copied: Job, lost: str, first: str) -> None:
    (copied.run / lost).unlink()
    assert to_run(copied) == STAGES[STAGES.index(first) :]


@pytest.mark.parametrize(
    ("damaged", "first"),
    [
        ("graph/manifest.json", "partition"),
        ("teacher/model.json", "teach"),
        ("students/distilled/model.json", "distill"),
        (layout.METRICS, "evaluate"),
        ("stages/report.json", "report"),
    ],
)
@pytest.mark.parametrize("text", ["", '{"kind": "gra', "[]"], ids=["empty", "truncated", "not an object"])
def test_a_damaged_document_counts_as_none(copied: Job, damaged: str, first: str, text: str) -> None:
    (copied.run / damaged).write_text(text)
    assert to_run(copied) == STAGES[STAGES.index(first) :]


def test_metrics_of_other_weights_are_not_trusted(copied: Job) -> None:
    """Trained again on other machines, a student of the same configuration may differ in the last bits."""
    folder = copied.session().student("distilled")
    document = folder.read_json(layout.MODEL_JSON)
    document["weights"]["sha256"] = "0" * 64
    del document["seal"]
    folder.write_json(layout.MODEL_JSON, sealed(document))
    assert to_run(copied) == ["evaluate", "export", "report"]


# --- discarding ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_discarded_stage_is_unfinished(copied: Job, stage: str) -> None:
    flow.stage(stage).discard(copied.session())
    assert to_run(copied)[0] == stage


@pytest.mark.parametrize("stage", STAGES)
def test_discarding_nothing_is_no_error(tmp_path: Path, stage: str) -> None:
    job = make_job(tmp_path)
    flow.stage(stage).discard(job.session())
    assert to_run(job) == STAGES


def test_discarded_training_starts_from_the_beginning(copied: Job) -> None:
    session = copied.session()
    assert session.student("distilled").list("checkpoints")
    flow.stage("distill").discard(session)
    assert session.student("distilled").list("checkpoints") == []


# --- stages one by one -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "needs"),
    [("teach", "partition"), ("infer", "partition"), ("distill", "partition"), ("report", "partition")],
)
def test_a_stage_without_input_names_the_one_to_run(tmp_path: Path, stage: str, needs: str) -> None:
    with pytest.raises(DataError, match=rf"stage {stage} reads what {needs} writes .*run `gkd {needs}` first"):
        flow.require_before(make_job(tmp_path).session(), stage)


@pytest.mark.parametrize(
    ("stage", "lost", "needs"),
    [
        ("infer", "teacher/model.json", "teach"),
        ("distill", "knowledge/*/manifest.json", "infer"),
        ("evaluate", "students/distilled/model.json", "distill"),
        ("export", "students/distilled/model.json", "distill"),
        ("report", layout.METRICS, "evaluate"),
    ],
)
def test_the_first_missing_input_is_named(copied: Job, stage: str, lost: str, needs: str) -> None:
    (file,) = copied.run.glob(lost)
    file.unlink()
    with pytest.raises(DataError, match=f"run `gkd {needs}` first"):
        flow.require_before(copied.session(), stage)


def test_the_report_does_not_need_the_export(copied: Job) -> None:
    (copied.run / "export" / "model.json").unlink()
    flow.require_before(copied.session(), "report")
