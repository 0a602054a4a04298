"""Fixtures that several folders of tests share."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flow_runs import Job

S3_BUCKET = "bucket"
# The server ends when its standard input does: however this process dies, nothing is left behind.
_S3_PROGRAM = """
import os, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture(scope="session")
def _s3_port() -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _S3_PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


@pytest.fixture
def s3_server(_s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Endpoint of a real S3 server with an empty bucket ``bucket``; the environment points to it."""
    for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{S3_BUCKET}")):
        connection = http.client.HTTPConnection("127.0.0.1", _s3_port, timeout=10)
        connection.request(method, path)
        assert connection.getresponse().status == 200
        connection.close()
    endpoint = f"http://127.0.0.1:{_s3_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    return endpoint


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small run of every stage in this process; tests read it, and change only copies."""
    from flow_runs import STAGES, make_job

    job = make_job(tmp_path_factory.mktemp("finished"))
    outcome = job.gkd("run")
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES
    return job


@pytest.fixture
def copied(finished: Job, tmp_path: Path) -> Job:
    """A copy of the finished run that a test may change."""
    from flow_runs import make_job

    job = make_job(tmp_path / "copied")
    shutil.copytree(finished.run, job.run)
    return job
