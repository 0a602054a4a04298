"""The launchers are sound shell, call only what exists and answer wrong use with one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted((ROOT / "launch").glob("*.sh"))
SCRIPTS = [*LAUNCHERS, ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
CALL = re.compile(r"(?:(?:^|[\s/])gkd|-m gkd_dist) ([a-z]+)")


def code(path: Path) -> str:
    """The script without its comments."""
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


def verbs() -> set[str]:
    """Verbs of ``gkd`` that the scripts and the Makefile call."""
    return {verb for path in [*SCRIPTS, ROOT / "Makefile"] for verb in CALL.findall(code(path))}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "--severity=style", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_stops_at_the_first_failure(path: Path) -> None:
    assert "set -euo pipefail" in code(path)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_it_can_be_started(path: Path) -> None:
    assert os.access(path, os.X_OK)


def test_the_scripts_call_verbs() -> None:
    assert verbs() >= {"run", "partition", "teach", "infer", "distill", "evaluate", "export", "report", "verify"}


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_the_verb_exists(verb: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gkd_dist", verb, "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_", "NNODES"))}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", [*(path.name for path in LAUNCHERS), "slurm.sbatch"])
def test_without_a_config_it_says_how_it_is_used(script: str) -> None:
    result = start(script)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "environment", "says"),
    [
        ("ray_job.sh", {}, "RAY_API_SERVER_ADDRESS is not set"),
        ("ray_job.sh", {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "nowhere.yaml is not a file here"),
        ("torchrun.sh", {"NNODES": "2"}, "NNODES=2 needs NODE_RANK and MASTER_ADDR"),
        ("deepspeed.sh", {"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere is not a file; write a line"),
        ("deepspeed.sh", {"HOSTFILE": str(ROOT / "README.md")}, "HOSTFILE needs NODE_RANK and MASTER_ADDR"),
        ("slurm.sbatch", {}, "start this file with sbatch"),
    ],
)
def test_what_is_missing_is_named(script: str, environment: dict[str, str], says: str) -> None:
    result = start(script, "nowhere.yaml", **environment)
    assert result.returncode != 0
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_token_is_never_printed() -> None:
    text = code(ROOT / "launch" / "slurm.sbatch")
    assert "token_hex" in text
    assert not re.search(r"(echo|printf|cat)[^\n]*token", text)
    assert "set -x" not in text


# programs of Slurm, Ray and this package, as far as the script uses them
_STAND_INS = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "ray": '[ "$1" = stop ] && exit 0; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "scontrol": 'echo "scontrol $*"',
    "scancel": 'echo "scancel $*"',
    "gkd": 'trap \'echo "driver got SIGTERM"; exit 143\' TERM; echo "driver $*"; while :; do sleep 0.1; done',
}


# what torchrun says at the end, as far as the script reads it
_REPORT = """Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 16857)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 16858)
"""


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (_REPORT.format(code=4), 4),
        (_REPORT.format(code=3), 3),
        (_REPORT.format(code=143), 143),
        (_REPORT.format(code=-9), 4),  # killed
        ("torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15", 143),
        ("no such file", 1),
    ],
)
def test_torchrun_ends_with_the_exit_code_of_the_rank_that_was_first(tmp_path: Path, report: str, code: int) -> None:
    (tmp_path / "report").write_text(report)
    for name, body in {"torchrun": f"cat {tmp_path}/report >&2; exit 1", "gkd": "true"}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    script = tmp_path / "launch" / "torchrun.sh"  # its .venv, which it would prefer, is not there
    script.parent.mkdir()
    script.write_text((ROOT / "launch" / "torchrun.sh").read_text())
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, "c.yaml"], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert report.strip() in done.stderr


def test_shortly_before_the_time_is_up_the_driver_is_asked_to_stop_and_the_job_goes_back_into_the_queue(
    tmp_path: Path,
) -> None:
    for name, body in _STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    env = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
    }
    script = subprocess.Popen(
        ["bash", ROOT / "launch" / "slurm.sbatch", "c.yaml", "a=b c"], env=env, stdout=subprocess.PIPE, text=True
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "driver run c.yaml a=b c ray.address=auto\n"
    script.send_signal(signal.SIGUSR1)
    out, _ = script.communicate(timeout=60)
    assert out.splitlines() == [
        "driver got SIGTERM",
        "launch/slurm.sbatch: the driver ended with 143, srun with 143",
        "launch/slurm.sbatch: the time is nearly up; back into the queue (restart 1 of at most 20)",
        "scontrol requeue 7",
    ]
    assert script.returncode == 143
    assert not list(tmp_path.glob(".gkd-slurm-*"))
