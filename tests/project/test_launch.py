"""The launchers are sound shell, call only what exists and answer wrong use with one sentence."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted((ROOT / "launch").glob("*.sh"))
SCRIPTS = [*LAUNCHERS, ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
SOURCED = ROOT / "launch" / "signals.bash"
CALL = re.compile(r"(?:(?:^|[\s/])gkd|-m gkd_dist) ([a-z]+)")


def code(path: Path) -> str:
    """The script without its comments."""
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


def verbs() -> set[str]:
    """Verbs of ``gkd`` that the scripts and the Makefile call."""
    return {verb for path in [*SCRIPTS, ROOT / "Makefile"] for verb in CALL.findall(code(path))}


@pytest.mark.parametrize("path", [*SCRIPTS, SOURCED], ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", [*SCRIPTS, SOURCED], ids=lambda path: path.name)
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
    done = with_stand_ins(tmp_path, "torchrun.sh", torchrun=f"cat {tmp_path}/report >&2; exit 1", gkd="true")
    _, err = done.communicate(timeout=60)
    assert done.returncode == code, err
    assert report.strip() in err


@pytest.mark.parametrize(
    ("ended", "code"),
    [(1, 1), (3, 3), (4, 4), (143, 143), (247, 4), (245, 4), (137, 4)],  # 247: its launcher's -9 for a killed rank
)
def test_deepspeed_ends_with_what_the_exit_code_of_its_launcher_means(tmp_path: Path, ended: int, code: int) -> None:
    done = with_stand_ins(tmp_path, "deepspeed.sh", deepspeed=f"exit {ended}", gkd="true")
    _, err = done.communicate(timeout=60)
    assert done.returncode == code, err


def with_stand_ins(folder: Path, script: str, **programs: str) -> subprocess.Popen[str]:
    """The script, started where its .venv, which it would prefer, is not there."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    (folder / "launch").mkdir()
    for path in (ROOT / "launch" / script, SOURCED):
        shutil.copy(path, folder / "launch")
    return subprocess.Popen(
        ["bash", folder / "launch" / script, "c.yaml"],
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_RANK = """trap 'echo "$RANK keeps a checkpoint"; sleep 1; echo "$RANK ends"; exit 143' TERM
echo "$RANK trains"; for i in {1..300}; do sleep 0.1; done"""
# launchers that a rank outlives: torchrun's gives it half a minute, deepspeed's passes nothing on
_TORCHRUN = """RANK=0 rank & RANK=1 rank & trap 'kill -KILL $(jobs -p); exit 1' TERM
wait -n || code=$?; wait; echo "  exitcode  : $code (pid: 7)" >&2; exit 1"""
_LAUNCH = "RANK=0 rank & RANK=1 rank & trap 'kill -KILL $(jobs -p); exit 1' TERM; wait -n || code=$?; wait; exit $code"


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_sigterm_to_the_script_reaches_the_ranks_and_waits_for_their_checkpoint(tmp_path: Path, script: str) -> None:
    programs = {"rank": _RANK, "torchrun": _TORCHRUN, "launch.py": _LAUNCH, "deepspeed": "launch.py & wait $!"}
    running = with_stand_ins(tmp_path, script, gkd='echo "gkd $1"', **programs)
    assert running.stdout is not None
    lines = [running.stdout.readline().strip() for _ in range(5)]
    assert sorted(lines) == ["0 trains", "1 trains", "gkd infer", "gkd partition", "gkd teach"]
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    said = ["0 ends", "0 keeps a checkpoint", "1 ends", "1 keeps a checkpoint"]  # and no `gkd evaluate`
    assert sorted(out.splitlines()) == said, err
    assert running.returncode == 143


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=lambda value: getattr(value, "name", "")
)
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_signal_during_a_stage_before_ends_that_and_the_script(
    tmp_path: Path, script: str, signum: signal.Signals, code: int
) -> None:
    stage = "trap 'exit 143' TERM; trap 'exit 130' INT; echo \"$1\"; for i in {1..300}; do sleep 0.1; done"
    running = with_stand_ins(tmp_path, script, gkd=stage)
    assert running.stdout is not None
    assert running.stdout.readline() == "partition\n"
    running.send_signal(signum)
    out, err = running.communicate(timeout=60)
    assert (out, running.returncode) == ("", code), err


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
