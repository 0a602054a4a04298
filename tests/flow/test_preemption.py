"""SIGTERM takes a checkpoint first: no step is lost, and the same command ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flow_runs import ON_RAY, Job, Outcome, gkd_process, make_job, process_env, results
from processes import STRUCK, ended, started, wait_for

from gkd_dist import layout
from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.storage import Storage
from gkd_dist.tensorboard import read_curves

pytestmark = pytest.mark.timeout(300)
RARELY = "distill.checkpoint_every=1000000"


def last_trained_step(job: Job, name: str = "distilled") -> int:
    curves = read_curves(Storage.open(str(job.run / layout.TENSORBOARD / name)))
    return int(max(step for step, *_ in curves["loss/total"]))


def kept(job: Job, folder: str = "students/distilled") -> list[int]:
    return committed_steps(Storage.open(str(job.run / folder)))


def resumed_from(job: Job, folder: str = "students/distilled") -> int:
    meta = json.loads((job.run / folder / layout.MODEL_JSON).read_text())["meta"]
    return int(meta["summary"]["resumed_from_step"])


def assert_stopped(outcome: Outcome) -> None:
    assert outcome.code == 143, outcome.err
    assert "was asked to stop (SIGTERM)" in outcome.complaint
    assert outcome.complaint.endswith("run the same command again, it goes on from there")


@pytest.mark.parametrize(
    ("folder", "number"), [("teacher", 1), pytest.param("students/distilled", 2, marks=pytest.mark.slow)]
)
def test_in_one_process(tmp_path: Path, finished: Job, folder: str, number: int) -> None:
    job = make_job(tmp_path)
    strike = ("SIGTERM", "after", f"run/{folder}/checkpoints/*/COMMIT.json", str(number))
    outcome = gkd_process(*strike, "run", str(job.config), program=(STRUCK,))
    assert_stopped(outcome)
    last = last_trained_step(job, folder.rpartition("/")[2])
    assert kept(job, folder)[-1] == last  # not the periodic one alone: the last step that was made
    assert not (job.run / layout.OWNER).exists()
    assert job.gkd("run").code == 0
    assert resumed_from(job, folder) == last
    assert results(job.run) == results(finished.run)


def on_torchrun(job: Job, *more: str) -> list[str]:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d")
    launcher += ("--rdzv-endpoint=localhost:0",)
    return [*launcher, "-m", "gkd_dist", "distill", str(job.config), "distill.launcher=torchrun", *more]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """By rank."""
    children = [one for one in psutil.Process(process.pid).children() if "gkd_dist" in one.cmdline()]
    return sorted(children, key=lambda one: int(one.environ()["RANK"]))


def untrained(job: Job, folder: Path) -> Job:
    """A copy of a run without its students and what came after."""
    copy = make_job(folder)
    shutil.copytree(job.run, copy.run)
    for name in ("students", "tensorboard/distilled"):
        shutil.rmtree(copy.run / name)
    return copy


@pytest.mark.slow
def test_under_torchrun_all_ranks_stop_after_the_same_step_whoever_was_told(tmp_path: Path, finished: Job) -> None:
    long = ("distill.num_workers=2", "distill.epochs=150", "student.alone=false")
    calm, job = untrained(finished, tmp_path / "calm"), untrained(finished, tmp_path / "stopped")
    with started(*on_torchrun(job, *long, RARELY)) as process:
        wait_for(lambda: has_trained(job, 5), process)
        ranks_of(process)[1].send_signal(signal.SIGTERM)  # rank 0, which writes, learns of it from the counts
        outcome = ended(process)
    assert outcome.code != 0
    assert outcome.err.count("was asked to stop (SIGTERM) and did so after step") == 2, outcome.err
    last = last_trained_step(job)
    assert kept(job) == [last]
    for one in (job, calm):
        done = subprocess.run(
            [sys.executable, *on_torchrun(one, *long, RARELY)], env=process_env(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert resumed_from(job) == last
    weights = [(one.run / "students/distilled/model.safetensors").read_bytes() for one in (job, calm)]
    assert weights[0] == weights[1]


def has_trained(job: Job, steps: int) -> bool:
    try:
        return last_trained_step(job) >= steps
    except (KeyError, ValueError, OSError):
        return False


@pytest.mark.slow
def test_a_driver_of_ray_workers_waits_for_their_checkpoint(tmp_path: Path, finished: Job) -> None:
    job = untrained(finished, tmp_path)
    command = ("distill", str(job.config), *ON_RAY, "distill.epochs=400", "student.alone=false", RARELY)
    with started("-m", "gkd_dist", *command) as process:
        wait_for(lambda: has_trained(job, 5), process)
        family = psutil.Process(process.pid).children(recursive=True)
        asked = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        outcome = ended(process)
        assert psutil.wait_procs(family, timeout=10)[1] == []
    assert time.monotonic() - asked < 45
    assert_stopped(outcome)
    last = last_trained_step(job)
    assert kept(job) == [last]
    assert f"after step {last}, which is kept" in outcome.complaint
    assert not list((job.run / "students/distilled").glob("stop*"))
    again = gkd_process(*command)
    assert again.code == 0, again.err
    assert resumed_from(job) == last
