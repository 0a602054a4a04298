"""Objects behind `fsspec`: S3, Google Cloud Storage, Azure, memory and whatever else is installed.

The one file that imports `fsspec`. Its own caches and retries are switched off (`clients`): listings
would be stale, and retries inside retries make a wait unbounded. Ranges are always passed by keyword as
``start=`` and ``end=``, because the position of these arguments differs between implementations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from gkd_dist.errors import ConfigError
from gkd_dist.storage import clients
from gkd_dist.storage.errors import http_status, is_not_found, is_retryable
from gkd_dist.storage.native import open_reader
from gkd_dist.storage.uploads import UPLOADS, Upload

Buffer = bytes | memoryview
_log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_CHUNKS_AT_ONCE = 4
_PATTERN = frozenset("*?[]")  # `rm` of many takes them for a pattern, and then misses the object itself
_SLOWEST_BYTES_PER_S = 1 << 20  # a request may take timeout_s and one second more per MiB
_ATOMIC = {*clients.FAMILIES, "memory", "oss"}  # a reader sees a whole object or none


class RemoteBackend:
    """Objects of one protocol with one set of options; opened at the first use in each process."""

    batch_bytes = _CHUNK_BYTES * _CHUNKS_AT_ONCE
    takes_pieces = False

    def __init__(self, protocol: str, options: dict[str, Any], timeout_s: float, native_reads: bool = True) -> None:
        self.protocol = protocol
        self._native = open_reader(protocol, options, timeout_s) if native_reads else None
        self._options = clients.options(protocol, options, timeout_s)
        self._timeout_s = timeout_s
        self._opened: tuple[int, fsspec.AbstractFileSystem] | None = None

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system of this process: its event loop does not survive a fork."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = (os.getpid(), _open(self.protocol, self._options))
        return opened[1]

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        """Bytes ``[start, stop)`` that exist, like a slice."""
        if stop is not None and stop - start <= _CHUNK_BYTES:
            return bytes(self._read_chunk(path, start, stop))
        pieces: list[Buffer] = []
        while stop is None or start < stop:
            end = start + _CHUNK_BYTES if stop is None else min(stop, start + _CHUNK_BYTES)
            pieces.append(self._read_chunk(path, start, end))
            if len(pieces[-1]) < end - start:
                break
            start = end
        return b"".join(pieces)

    def read_into(self, path: str, view: memoryview, start: int) -> int:
        """Fills ``view`` from offset ``start``; the number of bytes read, short at the end of the object."""
        starts = [start + offset for offset in range(0, len(view), _CHUNK_BYTES)]
        ends = [min(start + len(view), s + _CHUNK_BYTES) for s in starts]
        if len(starts) <= 1:
            return _place(view, self._read_chunk(path, start, start + len(view)), 0)
        if self._native is not None:
            with ThreadPoolExecutor(_CHUNKS_AT_ONCE, "chunks") as pool:
                return _fill(
                    view, start, starts, ends, pool.map(lambda s, e: self._read_chunk(path, s, e), starts, ends)
                )
        if not isinstance(self.fs, AsyncFileSystem):
            return _place(view, self.read(path, start, start + len(view)), 0)
        pieces = self._call("cat_ranges", len(view), [path] * len(starts), starts, ends, on_error="return")
        checked = (
            self._after_error(path, first, piece) if isinstance(piece, BaseException) else piece
            for first, piece in zip(starts, pieces, strict=True)
        )
        return _fill(view, start, starts, ends, checked)

    def write(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Stores the object."""
        payload = bytes(data) if isinstance(data, memoryview) else data
        if self.protocol not in _ATOMIC:
            self.fs.makedirs(self.fs._parent(path), exist_ok=True)
        self._call("pipe_file", len(payload), path, payload)

    def begin_upload(self, path: str, num_bytes: int, part_bytes: int) -> Upload | None:
        """An upload in parts; None where the store takes an object in one request."""
        kind = UPLOADS.get(clients.FAMILIES.get(self.protocol, ""))
        return kind(self.fs, self._run, path, num_bytes, part_bytes) if kind else None

    def size(self, path: str) -> int:
        """Bytes of the object."""
        info = self._call("info", 0, path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def is_file(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(path)
        except Exception as error:
            if is_not_found(error):
                return False
            raise
        return True

    def delete(self, paths: list[str]) -> None:
        """Removes objects; those that are not there are no error."""
        plain = [path for path in paths if not _PATTERN & set(path)]
        if len(plain) > 1 and hasattr(self.fs, "_bulk_delete"):
            self._call("rm", len(plain) << 10, plain)
            paths = [path for path in paths if _PATTERN & set(path)]
        for path in paths:
            try:
                self._call("rm_file", 0, path)
            except Exception as error:
                if not is_not_found(error):
                    raise

    def list(self, root: str, leftovers: bool = False) -> list[str]:
        """Names under ``root``, relative to it. An object store has no ``leftovers``."""
        if leftovers:
            return []
        try:
            found = self._call("find", 1 << 30, root)
        except Exception as error:
            if is_not_found(error):
                return []
            raise
        prefix = self.fs._strip_protocol(root).rstrip("/") + "/"
        return sorted(name[len(prefix) :] for name in found if name.startswith(prefix))

    def tidy(self, root: str) -> None:
        """Nothing: an object store has no folders."""

    def _read_chunk(self, path: str, start: int, end: int) -> Buffer:
        if start >= end:
            return b""
        if self._native is not None and (found := self._native.read(path, start, end)) is not None:
            return memoryview(found)
        try:
            return bytes(self._call("cat_file", end - start, path, start=start, end=end))
        except Exception as error:
            return self._after_error(path, start, error)

    def _after_error(self, path: str, start: int, error: BaseException) -> bytes:
        """Empty where the range began behind the end of the object, which most stores call an error."""
        outside = http_status(error) == 416 or not (is_not_found(error) or is_retryable(error))
        if outside and not isinstance(error, PermissionError) and start >= self.size(path):
            return b""
        raise error

    def _call(self, method: str, num_bytes: int, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the file system, bounded in time where it is asynchronous inside."""
        coroutine: Callable[..., Any] | None = getattr(self.fs, f"_{method}", None)
        if isinstance(self.fs, AsyncFileSystem) and coroutine is not None:
            return self._run(coroutine, num_bytes, *args, **kwargs)
        return getattr(self.fs, method)(*args, **kwargs)

    def _run(self, coroutine: Callable[..., Any], num_bytes: int, *args: Any, **kwargs: Any) -> Any:
        """Result of a coroutine function on the loop of the file system, cancelled when it takes too long."""
        limit = self._timeout_s + num_bytes / _SLOWEST_BYTES_PER_S
        return sync(self.fs.loop, coroutine, *args, timeout=limit, **kwargs)


def _fill(view: memoryview, start: int, starts: Sequence[int], ends: Sequence[int], pieces: Iterable[Buffer]) -> int:
    """Puts the pieces of an object into ``view``, up to the first one that is short; the number of bytes."""
    done = 0
    for first, last, piece in zip(starts, ends, pieces, strict=True):
        done = _place(view, piece, first - start)
        if len(piece) < last - first:
            break
    return done


def _place(view: memoryview, piece: Buffer, offset: int) -> int:
    view[offset : offset + len(piece)] = piece
    return offset + len(piece)


def _open(protocol: str, options: dict[str, Any]) -> fsspec.AbstractFileSystem:
    family = clients.FAMILIES.get(protocol, "")
    clients.prepare(family)
    try:
        # no shared instances: they keep the endpoint and the credentials of their first use
        fs = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except ImportError as error:
        action = f"`pip install 'gkd_dist[{family}]'`" if family else "install the package named above"
        raise ConfigError(f"cannot open {protocol}:// URLs ({error}); {action}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot open {protocol}:// URLs: {error}; check the URL, storage.options.{protocol} and "
            f"{clients.credentials(protocol)}"
        ) from error
    clients.without_retries(family, fs)
    if protocol not in _ATOMIC:
        _log.warning(
            "%s: a reader may see an object while it is written; an object store or a folder is safer", protocol
        )
    return fs
