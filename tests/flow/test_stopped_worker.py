"""C7 on Ray: a worker that is stopped and answers nobody is noticed by its peers, and the group starts again."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from flow_runs import ON_RAY, Job, gkd_process, make_job
from paced import EACH_STEP
from processes import started, wait_for

from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.storage import Storage

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]
PACED = str(Path(__file__).parents[1] / "paced.py")
SETTINGS = (*ON_RAY, *EACH_STEP, "distill.epochs=80", "distill.peer_timeout_s=8")


def untrained(finished: Job, folder: Path) -> Job:
    job = make_job(folder)
    shutil.copytree(finished.run, job.run)
    shutil.rmtree(job.run / "students")
    return job


def workers(driver: int) -> list[psutil.Process]:
    family = psutil.Process(driver).children(recursive=True)
    found = [one for one in family if one.is_running() and "RayTrainWorker" in " ".join(one.cmdline())]
    return sorted(found, key=lambda one: one.create_time())


@pytest.mark.parametrize("number", [0, 1])
def test_the_group_starts_again_and_ends_with_the_same_bits(tmp_path: Path, finished: Job, number: int) -> None:
    job, calm = untrained(finished, tmp_path / "stopped"), untrained(finished, tmp_path / "calm")
    student = Storage.open(str(job.run / "students/distilled"))
    with started(PACED, "0.2", "distill", str(job.config), *SETTINGS) as process:
        wait_for(lambda: len(committed_steps(student)) > 0, process, timeout_s=400)
        workers(process.pid)[number].send_signal(signal.SIGSTOP)
        stopped, reached = time.monotonic(), committed_steps(student)[-1]
        wait_for(lambda: committed_steps(student)[-1] > reached + 3, process, timeout_s=300)
        print(f"goes on {time.monotonic() - stopped:.0f} s after it was stopped", file=sys.stderr)
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "has been silent for" in err
    assert "the worker group is started again" in err
    assert gkd_process("distill", str(calm.config), *SETTINGS, timeout=500).code == 0
    weights = [(one.run / "students/distilled/model.safetensors").read_bytes() for one in (job, calm)]
    assert weights[0] == weights[1]
