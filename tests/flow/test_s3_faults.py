"""An S3 server that misbehaves: what is retried, how often, and what is not."""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import struct
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from gkd_dist.config import StorageConfig
from gkd_dist.errors import StorageError
from gkd_dist.storage import Storage
from gkd_dist.storage import errors as storage_errors

pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
pytest.importorskip("moto", reason="needs the extra: pip install 'gkd_dist[dev]'")

DATA = bytes(range(256)) * 64


class FaultyProxy(http.server.ThreadingHTTPServer):
    """Passes requests on, except where ``faults`` holds a misbehaviour for the next one."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.faults: list[str] = []
        self.requests: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: connections that clients drop are what these tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def answer(self) -> None:
        self.server.requests.append(self.command)
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault.isdigit():
            self.reply(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>" if fault == "503" else b"")
            return
        status, headers, body = self.forward(sent)
        if fault == "short":  # claims more than it sends
            self.reply(status, headers, body, body[: len(body) // 2])
            self.close_connection = True
        elif fault == "reset":
            self.reply(status, headers, body, body[:100])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # `close` would wait for the streams on top of the socket
        else:
            self.reply(status, headers, body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def forward(self, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=10)
        upstream.request(self.command, self.path, sent, dict(self.headers))
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        return response.status, dict(response.headers), body

    def reply(self, status: int, headers: dict[str, str], body: bytes, sent: bytes | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body if sent is None else sent)
        self.wfile.flush()


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.01)
    server = FaultyProxy(s3_server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


@pytest.fixture
def store(proxy: FaultyProxy) -> Storage:
    options = {"s3": {"endpoint_url": f"http://127.0.0.1:{proxy.server_port}"}}
    store = Storage.open("s3://bucket/run", StorageConfig(options=options, retries=3, timeout_s=5))
    store.write("key", DATA)
    proxy.requests.clear()
    return store


@pytest.mark.parametrize("fault", ["503", "500", "429", "short", "reset"])
def test_a_read_survives_two_faults(fault: str, store: Storage, proxy: FaultyProxy) -> None:
    proxy.faults += [fault, fault]
    assert store.read("key") == DATA
    assert len(proxy.requests) == 3


@pytest.mark.parametrize("fault", ["503", "500"])
def test_a_write_survives_two_faults(fault: str, store: Storage, proxy: FaultyProxy) -> None:
    proxy.faults += [fault, fault]
    store.write("key", DATA[::-1])
    assert len(proxy.requests) == 3
    assert store.read("key") == DATA[::-1]


@pytest.mark.parametrize("fault", ["503", "short", "reset"])
def test_attempts_are_counted_and_end(fault: str, store: Storage, proxy: FaultyProxy) -> None:
    proxy.faults += [fault] * 10
    with pytest.raises(StorageError, match="cannot read s3://bucket/run/key after 4 attempts"):
        store.read("key")
    assert len(proxy.requests) == 4


def test_a_refusal_is_not_repeated(store: Storage, proxy: FaultyProxy) -> None:
    proxy.faults += ["403"] * 10
    with pytest.raises(StorageError, match=r"access denied .*check the credentials"):
        store.read("key")
    assert len(proxy.requests) == 1
