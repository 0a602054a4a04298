"""``gkd`` in processes of its own that tests stop, interrupt and kill."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from flow_runs import Outcome, process_env

STRUCK = str(Path(__file__).parent / "flow" / "struck.py")


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, as under a terminal; all that is left of it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_env(),
        start_new_session=True,
    )
    family = psutil.Process(process.pid)
    try:
        yield process
    finally:
        left = [family, *family.children(recursive=True)] if family.is_running() else []
        for one in left:
            one.kill()
        process.communicate(timeout=20)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Until ``condition`` holds; fails where the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def is_stopped(process: subprocess.Popen[str]) -> bool:
    """Whether it was struck by SIGSTOP."""
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def ended(process: subprocess.Popen[str]) -> Outcome:
    """What it left, when it has ended."""
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)
