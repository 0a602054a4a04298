"""Objects as files: atomic, durable writes and direct reads, without `fsspec`.

A write goes to a hidden temporary file of the same folder, is flushed to the disk, and takes its
name in one step; the folder is flushed last. A reader, or a crash at any moment, sees the old
object or the new one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_TEMPORARY = ".gkd-tmp"
STALE_S = 3600.0  # a temporary file of this age belongs to a writer that was killed


class LocalBackend:
    """Files under absolute paths. Stateless; errors are those of the operating system."""

    batch_bytes = 1 << 40  # a file is read in one go
    takes_pieces = True

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        """Bytes ``[start, stop)`` that exist, like a slice."""
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            stop = size if stop is None else min(stop, size)
            buffer = bytearray(max(0, stop - start))
            return bytes(memoryview(buffer)[: _fill(file.fileno(), memoryview(buffer), start)])

    def read_into(self, path: str, view: memoryview, start: int) -> int:
        """Fills ``view`` from offset ``start``; the number of bytes read, short at the end of the file."""
        with open(path, "rb", buffering=0) as file:
            return _fill(file.fileno(), view, start)

    def write(self, path: str, data: bytes | bytearray | memoryview | Sequence[bytes | memoryview]) -> None:
        """Replaces the file in one step; ``data`` may be in pieces."""
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name[:100]}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}")
        # not `tempfile`: its files are private to the user, stored objects follow the umask
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for piece in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
                    view = memoryview(piece).cast("B")
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _flush_folder(folder)

    def begin_upload(self, path: str, num_bytes: int, part_bytes: int) -> None:
        """None: a file is written in one go."""

    def size(self, path: str) -> int:
        """Bytes of the file."""
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        return os.stat(path).st_size

    def is_file(self, path: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(path)

    def delete(self, paths: list[str]) -> None:
        """Removes files; those that are not there are no error."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)

    def list(self, root: str, leftovers: bool = False) -> list[str]:
        """Names under ``root``, relative to it; no temporary files, or only those that are ``leftovers``."""
        names = []
        for path in _walk(Path(root)):
            temporary = path.name.endswith(_TEMPORARY)
            if temporary == leftovers and (not leftovers or _is_stale(path)):
                names.append(path.relative_to(root).as_posix())
        return sorted(names)

    def tidy(self, root: str) -> None:
        """Removes the empty folders under ``root`` and ``root`` itself if it is empty."""
        for folder, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):  # not empty, or gone
                os.rmdir(folder)


def _fill(descriptor: int, view: memoryview, start: int) -> int:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if count == 0:
            break
        done += count
    return done


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            yield Path(folder, name)


def _is_stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return False


def _flush_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
