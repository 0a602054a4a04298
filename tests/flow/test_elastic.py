"""``distill.num_workers: [min, max]``: the worker group follows the cluster, and ends where a fixed one does."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
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


@contextmanager
def driven(hosts: Hosts, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``gkd`` on the first host, ended with the block."""
    process = subprocess.Popen(
        hosts.command(0, sys.executable, PACED, "0.4", *arguments),
        env={**hosts.env, "GLOO_SOCKET_IFNAME": "eth0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()


ELASTIC = (
    "distill.launcher=ray",
    "distill.num_workers=[1,2]",
    "distill.resize_every_s=2",
    f"ray.address={ADDRESSES[0]}:{PORT}",
    "distill.peer_timeout_s=10",
)


def test_workers_keep_a_checkpoint_when_their_node_is_drained_and_go_on_elsewhere(
    tmp_path: Path, finished: Job
) -> None:
    job = untrained(finished, tmp_path / "drained")
    student = Storage.open(str(job.run / "students/distilled"))
    settings = ("distill.epochs=6000", "distill.checkpoint_every=1000000", "student.alone=false")
    with two_hosts(tmp_path) as hosts:
        for host in (0, 1):
            hosts.start_ray(host, num_cpus=1)
        with driven(hosts, "distill", str(job.config), *settings, *ELASTIC) as process:
            wait_for(lambda: student.exists("progress.json"), process, timeout_s=500)
            assert committed_steps(student) == []
            drain(hosts, 1, deadline_s=20)
            wait_for(lambda: len(committed_steps(student)) > 0, process, timeout_s=200)
            out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert "a node of this worker group is going away: keeping a checkpoint" in err
    meta = json.loads((job.run / "students/distilled/model.json").read_text())["meta"]
    assert meta["summary"]["resumed_from_step"] > 0


def drain(hosts: Hosts, host: int, deadline_s: int) -> None:
    """Tells Ray that a host will be gone in so many seconds, as a cloud does that wants it back."""
    address = f"{ADDRESSES[0]}:{PORT}"
    script = (
        "import ray, subprocess, sys; ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "node = next(n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == sys.argv[2])\n"
        "sys.exit(subprocess.run([sys.executable, '-m', 'ray.scripts.scripts', 'drain-node', '--address', sys.argv[1],"
        " '--node-id', node, '--reason', 'DRAIN_NODE_REASON_PREEMPTION', '--reason-message', 'spot',"
        " '--deadline-remaining-seconds', sys.argv[3]]).returncode)"
    )
    command = hosts.command(0, sys.executable, "-c", script, address, ADDRESSES[host], str(deadline_s))
    done = subprocess.run(command, env=hosts.env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_grows_with_a_host_that_joins_and_shrinks_when_that_is_lost(tmp_path: Path, finished: Job) -> None:
    calm, job = untrained(finished, tmp_path / "calm"), untrained(finished, tmp_path / "elastic")
    alone = ("distill.launcher=inline", "distill.num_workers=1")
    assert gkd_process("distill", str(calm.config), *SETTINGS, *alone).code == 0
    student = Storage.open(str(job.run / "students/distilled"))
    sizes = []
    with two_hosts(tmp_path) as hosts:
        hosts.start_ray(0, num_cpus=1)

        def advances(by: int = 5) -> None:
            first = max(committed_steps(student), default=0)
            wait_for(lambda: max(committed_steps(student), default=0) >= first + by, process, timeout_s=500)

        with driven(hosts, "distill", str(job.config), *SETTINGS, *ELASTIC) as process:
            advances()
            sizes.append((workers(hosts, 0), workers(hosts, 1)))
            hosts.start_ray(1, num_cpus=1)
            wait_for(lambda: workers(hosts, 1) == 1, process, timeout_s=400)
            advances()
            sizes.append((workers(hosts, 0), workers(hosts, 1)))
            for one in hosts.processes(1):
                with suppress(psutil.Error):
                    one.send_signal(signal.SIGKILL)
            advances()
            sizes.append((workers(hosts, 0), workers(hosts, 1)))
            out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert sizes == [(1, 0), (1, 1), (1, 0)]
    found, expected = weights(job), weights(calm)
    for name, value in expected.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= max(1e-5 * size, 1e-7), f"{name}: {error:.2e} of {size:.2e}"
    meta = json.loads((job.run / "students/distilled/model.json").read_text())["meta"]
    assert meta["summary"]["epochs_run"] == 250
