"""Real servers of object stores for tests: S3 (moto), Google Cloud Storage and Azure emulators.

Each runs in a process of its own on a free port of the loopback interface, keeps its objects in
memory, and ends when its standard input does: however the tests die, nothing is left behind.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BUCKET = "bucket"
AZURE_ACCOUNT = "gkdtests"
_S3_PROGRAM = """
import os, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://127.0.0.1:%d" % server.get_host_and_port()[1], flush=True)
sys.stdin.read()
os._exit(0)
"""
_GS_PROGRAM = """
import logging, os, sys, threading
from functools import partial
from http import server
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
logging.disable(logging.CRITICAL)
httpd = server.HTTPServer(("127.0.0.1", 0), partial(RequestHandler, Storage(use_memory_fs=True)))
threading.Thread(target=httpd.serve_forever, daemon=True).start()
print("http://127.0.0.1:%d" % httpd.server_port, flush=True)
sys.stdin.read()
os._exit(0)
"""
_STOP_WITH_STDIN = "data:text/javascript,process.stdin.on('end',()=>process.exit(0)).resume()"
_AZURE_ARGUMENTS = (
    "--inMemoryPersistence",
    "--skipApiVersionCheck",
    "--silent",
    "--disableTelemetry",
    "--blobPort",
    "0",
)


@dataclass(frozen=True)
class Server:
    """A running server; ``key`` is the account key where the store has one."""

    port: int
    key: str = ""

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: str = "", headers: dict[str, str] | None = None) -> bytes:
        """Body of the answer to a plain request, which must succeed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        found = response.read()
        connection.close()
        assert response.status == 200, (response.status, found)
        return found


@contextmanager
def s3() -> Iterator[Server]:
    """moto's S3."""
    with _program([sys.executable, "-c", _S3_PROGRAM]) as port:
        yield Server(port)


@contextmanager
def gs() -> Iterator[Server]:
    """gcp-storage-emulator."""
    with _program([sys.executable, "-c", _GS_PROGRAM]) as port:
        yield Server(port)


@contextmanager
def azure() -> Iterator[Server]:
    """Azurite's blob service, with an account and a key of its own."""
    program, key = shutil.which("azurite-blob"), base64.b64encode(secrets.token_bytes(32)).decode()
    assert program is not None
    command = ["node", "--import", _STOP_WITH_STDIN, os.path.realpath(program), *_AZURE_ARGUMENTS]
    with _program(command, {"AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{key}"}) as port:
        yield Server(port, key)


def azure_connection(server: Server, key: str | None = None) -> str:
    """Connection string of the Azure server."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={key or server.key};"
        f"BlobEndpoint={server.endpoint}/{AZURE_ACCOUNT};"
    )


@contextmanager
def _program(command: list[str], environment: dict[str, str] | None = None) -> Iterator[int]:
    """A program that serves until its standard input ends; yields the port that it names."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        found = (re.search(r"http://127\.0\.0\.1:(\d+)", line) for line in iter(process.stdout.readline, ""))
        yield next(int(match.group(1)) for match in found if match)
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()
