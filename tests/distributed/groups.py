"""Starts the ranks of a test group as fresh processes and collects them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_group(world_size: int, script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """The ranks of a group, running ``script`` of this folder in fresh processes on loopback."""
    env = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests/distributed" / script), *arguments]
    return [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def stop_group(ranks: list[subprocess.Popen[str]]) -> None:
    """Ends the ranks that still run, stopped ones included."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def run_group(world_size: int, script: str, *arguments: str, timeout_s: float = 200) -> None:
    """Runs ``script`` on every rank; raises with the ranks' errors unless all of them succeed."""
    ranks = start_group(world_size, script, *arguments)
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in ranks]
    finally:
        stop_group(ranks)
    failed = [(rank, out) for rank, (process, out) in enumerate(zip(ranks, outputs, strict=True)) if process.returncode]
    assert not failed, "\n".join(f"rank {rank}:\n{out[-3000:]}" for rank, out in failed)


class Ranks:
    """Groups of ranks that stay from case to case, one for each world size; see ``ranks.py``.

    They are started by the first request, and again by the next one after a request that failed.
    ``extensions`` is a folder, empty at first, for what torch and DeepSpeed compile.
    """

    def __init__(self) -> None:
        self.extensions = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        env |= {"TORCH_EXTENSIONS_DIR": self.extensions.name}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ranks"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def do(self, timeout_s: float = 180, **request: object) -> None:
        """Has every rank of ``world_size`` do the request; fails with what went wrong."""
        self._process = self._process or self._start()
        problem = _ask(self._process, timeout_s, request)
        if problem:
            self._end()
        assert not problem, problem

    def _end(self) -> None:
        """Ends all groups."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Ends all groups for good."""
        self._end()
        self.extensions.cleanup()


def _ask(process: subprocess.Popen[str], timeout_s: float, request: dict[str, object]) -> str:
    """What went wrong with a request, or an empty string."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], timeout_s)[0]:
        return f"no answer after {timeout_s:g} s"
    return str(json.loads(process.stdout.readline()))
