"""Stores with a hook: the process that writes to them is struck at one moment of one write, and only once.

`StruckStorage` strikes inside the writer, wherever it was pickled to; `striking_proxy` strikes the
writer from the side of an S3 server, so that the client code is left alone. Moments of a write::

    before   nothing has reached the store
    half     half of the bytes have
    after    all have, but the writer has not told anybody
"""

from __future__ import annotations

import http.client
import http.server
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil

from gkd_dist.storage import Storage


@dataclass(frozen=True)
class Strike:
    """What happens to the first process that comes to ``moment`` of a write whose URL matches ``pattern``.

    ``marker`` is created by that process, with its id, so that its successor passes. ``how``:

    - ``kill``: SIGKILL of itself
    - ``stop``: SIGSTOP of itself
    - ``host``: SIGKILL of its parent, the raylet of its host; it holds its task until Ray ends it
    - ``hold``: nothing, but it never goes on: for whoever waits for the marker

    ``address``: only a process on that Ray node. ``journal``: a file that gets one line per write.
    """

    moment: str
    pattern: str
    marker: Path
    how: str = "kill"
    address: str = ""
    journal: Path | None = None

    def claims(self, url: str) -> bool:
        """Whether this process is the one, from now on."""
        if not re.search(self.pattern, url) or (self.address and _node_address() != self.address):
            return False
        try:
            descriptor = os.open(self.marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        os.write(descriptor, str(os.getpid()).encode())
        os.close(descriptor)
        return True

    def land(self) -> None:
        """Does it. Returns only after SIGSTOP and SIGCONT."""
        if self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        if self.how in ("kill", "host"):
            os.kill(os.getpid() if self.how == "kill" else os.getppid(), signal.SIGKILL)
        while True:
            time.sleep(60)

    @property
    def pid(self) -> int | None:
        """The process that was struck; None: none yet."""
        return int(self.marker.read_text()) if self.marker.exists() else None


class StruckStorage(Storage):
    """A store of any kind whose `write` is watched. The half of a write needs a ``file`` store."""

    strike: Strike

    @classmethod
    def around(cls, storage: Storage, strike: Strike) -> StruckStorage:
        """``storage``, watched."""
        struck = cls(storage.protocol, storage.root, storage.config)
        struck.strike = strike
        return struck

    def __getstate__(self) -> Any:
        return super().__getstate__(), self.strike

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        self.strike = state[1]

    def child(self, prefix: str) -> StruckStorage:
        """The store below ``prefix``, watched too."""
        return self.around(super().child(prefix), self.strike)

    def write(self, key: str, data: Any) -> None:
        """Writes, unless struck."""
        strike = self.strike
        if strike.journal is not None:
            with strike.journal.open("a") as journal:
                journal.write(f"{self.url}/{key}\n")
        hit = strike.claims(f"{self.url}/{key}")
        if hit and strike.moment == "before":
            strike.land()
        if hit and strike.moment == "half":
            os.fsync = lambda descriptor: _land_in_the_middle(strike, descriptor)
        super().write(key, data)
        if hit and strike.moment == "after":
            strike.land()


def _land_in_the_middle(strike: Strike, descriptor: int) -> None:
    """As if it had come before the second half of the file was written."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    strike.land()


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


# --- from the side of the server -------------------------------------------------------------


class StrikingProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to an S3 server and kills the client of the first PUT that matches, at ``moment``."""

    daemon_threads = True

    def __init__(self, endpoint: str, moment: str, pattern: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.moment, self.pattern = moment, pattern
        self.puts: list[str] = []  # paths, repeated ones too
        self.victim: int | None = None
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.server_port}"

    def moment_of(self, method: str, path: str, port: int) -> str:
        """When the client at ``port`` is to be killed during this request; empty: it is not."""
        with self._lock:
            if method != "PUT":
                return ""
            self.puts.append(path)
            if self.victim is not None or not re.search(self.pattern, path):
                return ""
            self.victim = _process_at(port)
            return self.moment

    def kill(self) -> None:
        """Kills the victim and waits until it is gone."""
        assert self.victim is not None
        victim = psutil.Process(self.victim)
        victim.kill()
        with suppress(psutil.TimeoutExpired):  # a child of Ray: a zombie until Ray has looked
            victim.wait(timeout=1)

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: connections that clients drop are what these tests are about."""


@contextmanager
def striking_proxy(endpoint: str, moment: str, pattern: str) -> Iterator[StrikingProxy]:
    """A running proxy."""
    proxy = StrikingProxy(endpoint, moment, pattern)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(timeout=5)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StrikingProxy

    def answer(self) -> None:
        moment = self.server.moment_of(self.command, unquote(self.path), self.client_address[1])
        if moment == "before":
            self.server.kill()
        sent = b"" if moment == "before" else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if moment == "half":
            self.forward_half(sent)
            self.server.kill()
        if moment in ("before", "half"):
            self.close_connection = True
            return
        status, headers, body = self.forward(sent)
        if moment == "after":
            self.server.kill()
            self.close_connection = True
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

    def forward_half(self, sent: bytes) -> None:
        """The server hears of all bytes and gets half of them."""
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=10)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                upstream.putheader(name, value)
        upstream.endheaders()
        upstream.send(sent[: len(sent) // 2])
        upstream.close()

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def _process_at(port: int) -> int:
    """Process whose connection comes from ``port`` of this machine."""
    found = [c.pid for c in psutil.net_connections("tcp4") if c.laddr.port == port and c.pid != os.getpid()]
    assert len(found) == 1, found
    assert found[0] is not None
    return found[0]
