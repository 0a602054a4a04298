"""Whatever is killed, the same command goes on, and ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from flow_runs import ON_RAY, STAGES, Job, digests, gkd_process, make_job, results
from processes import STRUCK, ended, is_stopped, started, wait_for

from gkd_dist import layout
from gkd_dist.storage import Storage

pytestmark = pytest.mark.timeout(300)


# --- the driver ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "key", "number", "stage"),
    [
        ("before", "graph/part-*", 2, "partition"),
        ("before", "teacher/checkpoints/*/COMMIT.json", 2, "teach"),
        ("after", "knowledge/*/tmp-*/*", 5, "infer"),
        ("before", "students/distilled/checkpoints/*/COMMIT.json", 2, "distill"),
        ("before", "students/alone/predictions/part-*", 2, "evaluate"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("before", "graph/manifest.json", 1, "partition"),
                ("after", "graph/manifest.json", 1, "teach"),
                ("after", "teacher/checkpoints/latest.json", 1, "teach"),
                ("before", "teacher/model.json", 1, "teach"),
                ("before", "knowledge/*/manifest.json", 1, "infer"),
                ("after", "students/distilled/checkpoints/*/state-*", 1, "distill"),
                ("before", "students/distilled/model.json", 1, "distill"),
                ("after", "students/distilled/model.json", 1, "distill"),
                ("after", "students/alone/checkpoints/latest.json", 2, "distill"),
                ("before", "metrics.json", 1, "evaluate"),
                ("before", "export/model.json", 1, "export"),
                ("before", "report.html", 1, "report"),
            ]
        ),
    ],
)
def test_killed_at_a_write_it_goes_on_to_the_same_bits(
    tmp_path: Path, finished: Job, when: str, key: str, number: int, stage: str
) -> None:
    job = make_job(tmp_path)
    killed = gkd_process("SIGKILL", when, f"run/{key}", str(number), "run", str(job.config), program=(STRUCK,))
    assert killed.code == -signal.SIGKILL, killed.err
    assert not (job.run / layout.REPORT).exists()
    resumed = job.gkd("run")
    assert resumed.code == 0, resumed.err
    assert resumed.done == STAGES[STAGES.index(stage) :]
    assert f"taking over file://{job.run} from process" in resumed.err
    assert results(job.run) == results(finished.run)
    assert job.gkd("verify").code == 0
    assert not list(job.run.glob("knowledge/*/tmp-*"))


def test_half_finished_work_is_not_done_twice(tmp_path: Path, finished: Job) -> None:
    """Inference and training go on where they stopped; curves have every step once."""
    from gkd_dist.tensorboard import read_curves

    job = make_job(tmp_path)
    strike = ("SIGKILL", "before", "run/students/distilled/checkpoints/*/COMMIT.json", "3")
    assert gkd_process(*strike, "run", str(job.config), program=(STRUCK,)).code == -signal.SIGKILL
    assert job.gkd("run").code == 0
    summary = json.loads((job.run / "students/distilled/model.json").read_text())["meta"]["summary"]
    assert summary["resumed_from_step"] == 8  # every fourth step is kept, the third one was lost
    for name in ("loss/total", "accuracy/val"):
        curves = [
            read_curves(Storage.open(str(run / "tensorboard/distilled")))[name] for run in (job.run, finished.run)
        ]
        assert curves[0] == curves[1]


# --- two drivers -----------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_who_drives(tmp_path: Path, finished: Job) -> None:
    job = make_job(tmp_path)
    with started(STRUCK, "SIGSTOP", "before", "run/teacher/model.json", "1", "run", str(job.config)) as first:
        wait_for(lambda: is_stopped(first), first)
        second = job.gkd("run")
        assert second.code == 4
        assert f"is driven by process {first.pid} on " in second.complaint
        assert "--take-over" in second.complaint
        assert job.gkd("run", "--dry-run").code == 0  # looking is allowed
        first.send_signal(signal.SIGCONT)
        assert ended(first).code == 0
    assert results(job.run) == results(finished.run)


def test_a_driver_that_lost_the_run_stops_at_its_next_commit(tmp_path: Path, finished: Job) -> None:
    job = make_job(tmp_path)
    with started(STRUCK, "SIGSTOP", "before", "run/knowledge/*/tmp-*/*", "4", "run", str(job.config)) as first:
        wait_for(lambda: is_stopped(first), first)
        assert job.gkd("run", "--take-over").code == 0
        before = digests(job.run, "graph/*", "knowledge/*/*.json", "students/**/*.json", "*.json")
        first.send_signal(signal.SIGCONT)
        outcome = ended(first)
    assert outcome.code == 4
    assert "no longer owns" in outcome.complaint
    assert digests(job.run, "graph/*", "knowledge/*/*.json", "students/**/*.json", "*.json") == before
    orphans = job.gkd("verify", "--prune", "--json").json["orphans"]
    assert len(orphans) == 1  # what it was just writing: named by its content, so that it overwrites nothing
    assert results(job.run) == results(finished.run)


# --- Ray -------------------------------------------------------------------------------------

LONG = (*ON_RAY, "distill.epochs=250", "distill.checkpoint_every=10", "student.alone=false")


def train_until_checkpoint(job: Job, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes of the run, at a moment when the workers train and have something to lose."""
    wait_for(lambda: bool(list(job.run.glob("students/distilled/checkpoints/*/COMMIT.json"))), process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 4  # Ray's daemons, actors and workers
    return family


@pytest.fixture
def untrained(copied: Job) -> Job:
    """A run that lacks its students."""
    shutil.rmtree(copied.run / "students")
    return copied


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The long run, undisturbed."""
    job = make_job(tmp_path_factory.mktemp("calm"))
    outcome = gkd_process("run", str(job.config), *LONG)
    assert outcome.code == 0, outcome.err
    return job


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(untrained: Job) -> None:
    command = ("run", str(untrained.config), *LONG)
    with started("-m", "gkd_dist", *command) as process:
        family = train_until_checkpoint(untrained, process)
        os.killpg(process.pid, signal.SIGINT)
        outcome = ended(process)
        gone_by = time.monotonic() + 10
        assert outcome.code == 130, outcome.err
        assert outcome.err.rstrip().endswith(f"nothing is lost, go on with: gkd {' '.join(command)}")
        assert "Traceback" not in outcome.err
        assert psutil.wait_procs(family, timeout=gone_by - time.monotonic())[1] == []
    again = gkd_process(*command)
    assert again.code == 0, again.err
    summary = json.loads((untrained.run / "students/distilled/model.json").read_text())["meta"]["summary"]
    assert summary["resumed_from_step"] >= 10
    assert summary["epochs_run"] == 250


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_its_run_goes_on_to_the_same_bits(untrained: Job, calm: Job) -> None:
    command = ("run", str(untrained.config), *LONG)
    with started("-m", "gkd_dist", *command) as process:
        family = train_until_checkpoint(untrained, process)
        process.kill()
        process.wait()
        deaf = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own, they look for their parent for a while
        ours = [one for one in family if one.is_running() and one.name() not in deaf]
        assert psutil.wait_procs(ours, timeout=15)[1] == []
        began = time.monotonic()
        assert psutil.wait_procs(family, timeout=120)[1] == []
        print("AGENTS", time.monotonic() - began)
    assert gkd_process(*command).code == 0
    assert results(untrained.run) == results(calm.run)
    summary = json.loads((untrained.run / "students/distilled/model.json").read_text())["meta"]["summary"]
    assert summary["resumed_from_step"] >= 10


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_changes_nothing(untrained: Job, calm: Job) -> None:
    with started("-m", "gkd_dist", "run", str(untrained.config), *LONG) as process:
        family = train_until_checkpoint(untrained, process)
        workers = [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        outcome = ended(process)
    assert outcome.code == 0, outcome.err
    assert results(untrained.run) == results(calm.run)
