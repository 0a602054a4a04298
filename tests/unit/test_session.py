"""What the stages of one command share, and what a run asks of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from flow_runs import ON_RAY, Job, make_job

from gkd_dist.session import Session, is_local, needed_resources


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_opening_touches_nothing(job: Job) -> None:
    session = job.session()
    assert session.teacher.url == f"file://{job.run}/teacher"
    session.close()
    assert not job.run.exists()


def test_stores_may_be_elsewhere(job: Job, tmp_path: Path) -> None:
    session = job.session(f"stores.graph={tmp_path}/g", "stores.knowledge=memory://k")
    assert session.graph.url == f"file://{tmp_path}/g"
    assert session.knowledge.url == "memory://k"


def test_what_is_known_is_read_once_until_a_stage_has_written(job: Job) -> None:
    session, read = job.session(), iter(range(9))
    assert [session.once("a", lambda: next(read)) for _ in range(2)] == [0, 0]
    assert session.once("b", lambda: next(read)) == 1
    session.forget()
    assert session.once("a", lambda: next(read)) == 2


def test_only_code_of_the_own_configuration_is_allowed(job: Job) -> None:
    assert job.session().allow_code == ()
    assert job.session("student.model.kind=mine:Student").allow_code == ("mine:Student",)


def test_a_run_in_one_process_starts_no_ray(job: Job) -> None:
    session = job.session()
    assert session.actors() is None
    session.make_room_for_workers()
    session.close()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (0, 0)),
        (ON_RAY, (4, 0)),  # idle actors stay while students train
        ((*ON_RAY, "ray.num_cpus=3"), (2, 0)),
        ((*ON_RAY, "infer.cpus_per_actor=0.5", "distill.cpus_per_worker=3"), (7, 0)),
        ((*ON_RAY, "infer.gpus_per_actor=0.5", "distill.gpus_per_worker=1"), (4, 2)),
    ],
)
def test_what_a_local_ray_is_asked_for(job: Job, overrides: tuple[str, ...], expected: tuple[float, float]) -> None:
    assert needed_resources(job.load(*overrides)) == expected


def test_a_cluster_is_asked_for_the_largest_stage(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job.load(*ON_RAY, "infer.num_actors=5")
    assert is_local(config)
    assert needed_resources(config) == (7, 0)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not is_local(config)
    assert needed_resources(config) == (5, 0)
    assert not is_local(job.load("ray.address=auto"))


def test_close_may_be_called_twice(job: Job) -> None:
    session: Session = job.session()
    session.close()
    session.close()
