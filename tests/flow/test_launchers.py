"""C2b across launchers: Ray Train, torchrun, the deepspeed launcher and this process give the same student."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flow_runs import BASE, Job, make_job, process_env
from safetensors.torch import load_file

from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.storage import Storage
from tests.distributed.groups import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.timeout(300)
SETTINGS = BASE.replace("lr: 0.02", "lr: 0.02, optimizer: sgd, grad_clip: 0.5, zero_stage: 2")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose students are trained in this process; tests copy what comes before them."""
    job = make_job(tmp_path_factory.mktemp("inline"), SETTINGS)
    for verb in ("partition", "teach", "infer", "distill"):
        outcome = job.gkd(verb)
        assert outcome.code == 0, outcome.err
    return job


def copy_of(prepared: Job, folder: Path) -> Job:
    job = make_job(folder, SETTINGS)
    shutil.copytree(prepared.run, job.run, ignore=shutil.ignore_patterns("students", "owner.json"))
    return job


def run(*command: str, timeout_s: float = 240) -> str:
    env = process_env() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"MASTER_PORT": str(free_port()), "NPROC": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_sigterm_to_the_script_keeps_a_checkpoint(prepared: Job, tmp_path: Path, script: str) -> None:
    job = copy_of(prepared, tmp_path)
    env = process_env() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"MASTER_PORT": str(free_port()), "NPROC": "2"}
    command = ["bash", str(ROOT / "launch" / script), str(job.config), "distill.epochs=100000", "student.alone=false"]
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    student = Storage.open(str(job.run)).child("students/distilled")
    deadline = time.monotonic() + 150
    while not committed_steps(student) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=100)
    assert running.returncode == 143, output[-3000:]
    kept = re.findall(r"did so after step (\d+), which is kept", output)
    assert kept, output[-3000:]
    assert {int(step) for step in kept} == {committed_steps(student)[-1]}
    assert "evaluate" not in output


def agree(job: Job, prepared: Job) -> None:
    for name in ("distilled", "alone"):
        expected = load_file(prepared.run / "students" / name / "model.safetensors")
        found = load_file(job.run / "students" / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).norm() <= TOLERANCE * value.norm().clamp_min(1e-3), f"{name} {key}"
        assert any(not torch.equal(found[key], torch.zeros_like(value)) for key, value in expected.items())


def test_torchrun(prepared: Job, tmp_path: Path) -> None:
    job = copy_of(prepared, tmp_path)
    where = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    settings = ["distill.launcher=torchrun", "distill.num_workers=2"]
    run("torchrun", *where, "-m", "gkd_dist", "distill", str(job.config), *settings)
    agree(job, prepared)


def test_the_deepspeed_launcher(prepared: Job, tmp_path: Path) -> None:
    job = copy_of(prepared, tmp_path)
    where = ["--hostfile", "/dev/null", "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank"]
    settings = ["distill.launcher=deepspeed", "distill.num_workers=2"]
    run("deepspeed", *where, "--module", "gkd_dist", "distill", str(job.config), *settings)
    agree(job, prepared)


@pytest.mark.slow
def test_ray_train(prepared: Job, tmp_path: Path) -> None:
    job = copy_of(prepared, tmp_path)
    run("gkd", "distill", str(job.config), "distill.launcher=ray", "distill.num_workers=2")
    agree(job, prepared)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_the_scripts_do_the_whole_run(prepared: Job, tmp_path: Path, script: str) -> None:
    job = copy_of(prepared, tmp_path)
    run("bash", str(ROOT / "launch" / script), str(job.config), timeout_s=800)
    agree(job, prepared)
    assert (job.run / "report.html").exists()
