"""An object server as fast as Python can be: the S3 requests that a benchmark needs, in memory, no checks.

    python benchmarks/object_server.py        # prints its port, ends when its standard input does
    python benchmarks/object_server.py 0.02   # every answer takes 20 ms more, as if it were far away

It stands for a store that is faster than its client: bodies are received into one buffer and sent
from it without a copy.
"""

from __future__ import annotations

import http.server
import os
import re
import sys
import threading
import time
import uuid
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_ETAG = '"00000000000000000000000000000000"'
_XML = '<?xml version="1.0" encoding="UTF-8"?>'


class Handler(http.server.BaseHTTPRequestHandler):
    """GET with Range, HEAD, PUT, DELETE and multipart uploads of ``/bucket/key``."""

    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def do_GET(self) -> None:
        body = self.server.objects.get(self._key())
        if body is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        start, stop = 0, len(body)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            start, stop = int(found.group(1)), min(stop, int(found.group(2) or stop) + 1)
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"} if found else {}
        self._answer(206 if found else 200, memoryview(body)[start:stop], headers)

    def do_HEAD(self) -> None:
        body = self.server.objects.get(self._key())
        self._answer(404 if body is None else 200, b"", {}, len(body or b""))

    def do_PUT(self) -> None:
        body = self._body()
        query = self._query()
        if "uploadId" in query:
            self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.server.objects[self._key()] = body
        self._answer(200, b"")

    def do_POST(self) -> None:
        self._body()
        upload = self._query().get("uploadId")
        if upload is None:
            upload = uuid.uuid4().hex
            self.server.uploads[upload] = {}
            name = "InitiateMultipartUploadResult"
            text = f"{_XML}<{name}><Bucket>b</Bucket><Key>k</Key><UploadId>{upload}</UploadId></{name}>"
        else:
            parts = self.server.uploads.pop(upload)
            self.server.objects[self._key()] = b"".join(parts[number] for number in sorted(parts))
            name = "CompleteMultipartUploadResult"
            text = f"{_XML}<{name}><Bucket>b</Bucket><Key>k</Key><ETag>{_ETAG}</ETag></{name}>"
        self._answer(200, text.encode(), {"Content-Type": "application/xml"})

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._key(), None)
        self._answer(204, b"")

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query, True).items()}

    def _body(self) -> bytearray:
        body = bytearray(int(self.headers.get("Content-Length", 0)))
        view = memoryview(body)
        while view:
            count = self.rfile.readinto(view)
            if not count:
                raise ConnectionError("the client left")
            view = view[count:]
        return body

    def _answer(
        self, status: int, body: bytes | memoryview, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        time.sleep(self.server.delay_s)
        self.send_response_only(status)
        for name, value in {"ETag": _ETAG, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if body:
            self.connection.sendall(body)


class ObjectServer(http.server.ThreadingHTTPServer):
    """The server; objects by path."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: a client that leaves is no news."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay_s = delay_s
        self.objects: dict[str, bytes | bytearray] = {}
        self.uploads: dict[str, dict[int, bytearray]] = {}


def main() -> None:
    server = ObjectServer(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
