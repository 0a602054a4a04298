"""A proxy in front of an object store that misbehaves by plan."""

from __future__ import annotations

import http.client
import http.server
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_STALL_S = 30.0  # longer than any time-out of a test; a proxy that stops lets go at once
_LATENCY_S = 0.2


@dataclass
class Fault:
    """What happens to some requests: those of ``method`` whose path contains ``key``, from the ``nth`` on, ``times``.

    ``kind`` is one of

    - an HTTP status such as ``503``: answered without asking the store
    - ``short``: a body that ends after half of its Content-Length
    - ``reset``: the connection is reset in mid-body
    - ``stall``: no answer
    - ``flip``: one bit of the body is another
    - ``twice``: the store gets the request two times
    - ``lost``: the store gets the request, its answer gets lost
    - ``late``: up to 200 ms of latency
    """

    kind: str
    method: str = ""
    key: str = ""  # regular expression
    nth: int = 1
    times: int = 1
    share: float = 1.0  # of those requests, at random
    matched: int = 0
    struck: int = 0  # how often it happened

    def strikes(self, method: str, path: str, draw: random.Random) -> bool:
        """Counts the request if it is one of these; whether something happens to it."""
        if (self.method and self.method != method) or not re.search(self.key, path):
            return False
        self.matched += 1
        hit = self.nth <= self.matched < self.nth + self.times and (self.share >= 1 or draw.random() < self.share)
        self.struck += hit
        return hit


class FaultProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to ``endpoint``; ``plan`` may be changed at any time, its first fault that strikes counts.

    Every answer takes ``delay_s`` more, as if the store were far away.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.plan: list[Fault] = []
        self.requests: list[str] = []
        self.paths: list[str] = []  # of the requests
        self.delay_s = 0.0
        self.stopped = threading.Event()
        self._lock, self._random = threading.Lock(), random.Random(0)

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str) -> str:
        """What happens to this request; empty: nothing."""
        with self._lock:
            self.requests.append(method)
            self.paths.append(path)
            return next((fault.kind for fault in self.plan if fault.strikes(method, path, self._random)), "")

    def latency_s(self) -> float:
        """A random wait."""
        with self._lock:
            return self._random.uniform(0, _LATENCY_S)

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: connections that clients drop are what these tests are about."""


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """A running proxy."""
    proxy = FaultProxy(endpoint)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join(timeout=5)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def answer(self) -> None:
        fault = self.server.fault(self.command, unquote(self.path))
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay_s)
        if fault.isdigit():
            self.reply(int(fault), {}, _REFUSALS.get(fault, b""))
        elif fault == "stall":
            self.server.stopped.wait(_STALL_S)
            self.close_connection = True
        else:
            self.pass_on(fault, sent)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def pass_on(self, fault: str, sent: bytes) -> None:
        if fault == "late":
            time.sleep(self.server.latency_s())
        if fault == "twice":
            self.forward(sent)
        status, headers, body = self.forward(sent)
        if fault == "short":
            self.reply(status, headers, body, body[: len(body) // 2])
            self.close_connection = True
        elif fault == "reset":
            self.reply(status, headers, body, body[: len(body) // 2])
            self.reset()
        elif fault == "lost":
            self.reset()
        elif fault == "flip":
            damaged = bytearray(body)
            damaged[len(body) // 2] ^= 1
            self.reply(status, headers, bytes(damaged))
        else:
            self.reply(status, headers, body)

    def forward(self, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=10)
        upstream.request(self.command, self.path, sent, dict(self.headers))
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        return response.status, dict(response.headers), body

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # `close` would wait for the streams on top of the socket

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


_REFUSALS = {
    "503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "507": b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free drive threshold"
    b"</Message></Error>",
}
