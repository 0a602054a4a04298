"""Fixtures that several folders of tests share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import object_servers
import pytest
from object_servers import BUCKET, Server

if TYPE_CHECKING:
    from flow_runs import Job


def pytest_configure() -> None:
    """A shell starts what it sends to the background with SIGINT ignored, and processes of tests would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _s3() -> Iterator[Server]:
    with object_servers.s3() as server:
        yield server


@pytest.fixture(scope="session")
def _gs() -> Iterator[Server]:
    with object_servers.gs() as server:
        yield server


@pytest.fixture(scope="session")
def _azure() -> Iterator[Server]:
    with object_servers.azure() as server:
        yield server


@pytest.fixture
def s3_server(_s3: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Endpoint of a real S3 server with an empty bucket ``bucket``; the environment points to it."""
    _s3.request("POST", "/moto-api/reset")
    _s3.request("PUT", f"/{BUCKET}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    return _s3.endpoint


@pytest.fixture
def gs_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A real server of the Google Cloud Storage API with an empty bucket ``bucket``; the environment points to it."""
    if find_spec("gcsfs") is None:  # not imported yet: the package sets a variable before it does
        pytest.skip("needs the extra: pip install 'gkd_dist[gcs]'")
    if find_spec("gcp_storage_emulator") is None:
        pytest.skip("needs the extra: pip install 'gkd_dist[dev]'")
    server: Server = request.getfixturevalue("_gs")
    server.request("GET", "/wipe")
    server.request("POST", "/storage/v1/b", f'{{"name": "{BUCKET}"}}', {"Content-Type": "application/json"})
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return server


@pytest.fixture
def azure_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A real server of the Azure blob API with an empty container ``bucket``; the environment points to it."""
    adlfs = pytest.importorskip("adlfs", reason="needs the extra: pip install 'gkd_dist[azure]'")
    if shutil.which("azurite-blob") is None:
        pytest.skip("needs azurite-blob in PATH: npm install azurite")
    server: Server = request.getfixturevalue("_azure")
    connection = object_servers.azure_connection(server)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    admin = adlfs.AzureBlobFileSystem(connection_string=connection, skip_instance_cache=True)
    if not admin.exists(BUCKET):
        admin.mkdir(BUCKET)
    for name in admin.find(BUCKET):
        admin.rm_file(name)
    return server


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
