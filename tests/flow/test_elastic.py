"""``distill.num_workers: [min, max]``: the worker group follows the cluster, and ends where a fixed one does."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from flow_runs import Job, gkd_process, make_job
from hosts import ADDRESSES, PORT, Hosts, two_hosts
from paced import EACH_STEP
from processes import wait_for

from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.models.io import read_model
from gkd_dist.storage import Storage

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
PACED = str(Path(__file__).parents[1] / "paced.py")
# weights of the last epoch, and an optimizer that does not blow up rounding
SETTINGS = ("distill.epochs=250", "distill.eval_every=250", "distill.optimizer=sgd", "distill.lr=0.01", *EACH_STEP)


def weights(job: Job) -> dict[str, torch.Tensor]:
    return read_model(Storage.open(str(job.run / "students/distilled")))[0].state_dict()


def untrained(finished: Job, folder: Path) -> Job:
    job = make_job(folder)
    shutil.copytree(finished.run, job.run)
    shutil.rmtree(job.run / "students")
    return job


def workers(hosts: Hosts, host: int) -> int:
    found = 0
    for process in hosts.processes(host):
        with suppress(psutil.Error):
            found += "RayTrainWorker" in " ".join(process.cmdline())
    return found


def test_it_grows_with_a_host_that_joins_and_shrinks_when_that_is_lost(tmp_path: Path, finished: Job) -> None:
    calm, job = untrained(finished, tmp_path / "calm"), untrained(finished, tmp_path / "elastic")
    alone = ("distill.launcher=inline", "distill.num_workers=1")
    assert gkd_process("distill", str(calm.config), *SETTINGS, *alone).code == 0
    elastic = ("distill.launcher=ray", "distill.num_workers=[1,2]", "distill.resize_every_s=2")
    elastic += (f"ray.address={ADDRESSES[0]}:{PORT}", "distill.peer_timeout_s=10")
    student = Storage.open(str(job.run / "students/distilled"))
    sizes = []
    with two_hosts(tmp_path) as hosts:
        hosts.start_ray(0, num_cpus=1)
        command = (sys.executable, PACED, "0.4", "distill", str(job.config), *SETTINGS, *elastic)
        process = subprocess.Popen(
            hosts.command(0, *command),
            env={**hosts.env, "GLOO_SOCKET_IFNAME": "eth0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def advances(by: int = 5) -> None:
            first = max(committed_steps(student), default=0)
            wait_for(lambda: max(committed_steps(student), default=0) >= first + by, process)

        try:
            advances()
            sizes.append((workers(hosts, 0), workers(hosts, 1)))
            hosts.start_ray(1, num_cpus=1)
            wait_for(lambda: workers(hosts, 1) == 1, process)
            advances()
            sizes.append((workers(hosts, 0), workers(hosts, 1)))
            for one in hosts.processes(1):
                with suppress(psutil.Error):
                    one.send_signal(signal.SIGKILL)
            advances()
            sizes.append((workers(hosts, 0), workers(hosts, 1)))
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, out + err
    assert sizes == [(1, 0), (1, 1), (1, 0)]
    found, expected = weights(job), weights(calm)
    for name, value in expected.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= max(1e-5 * size, 1e-7), f"{name}: {error:.2e} of {size:.2e}"
    meta = json.loads((job.run / "students/distilled/model.json").read_text())["meta"]
    assert meta["summary"]["epochs_run"] == 250
