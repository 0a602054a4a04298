"""A node-local disk cache for shards of remote stores, shared by all processes of a node.

::

    <folder>/objects/<sha256>     whole objects, named by their content, so that none is ever stale
    <folder>/locks/<3 digits>     one download per object and node
    <folder>/room.lock            held while room is made and an object is written

Only objects that a manifest names are cached: their digest says what they have to be. An object is
checked by sha256 when it is downloaded and by crc32 when a process first reads it from disk. Files
appear whole or not at all (temporary file, fsync, rename); a reader of an evicted file keeps it
open to the end. The folder has to be on a local disk, because `flock` is not reliable elsewhere.

Whatever is wrong with the disk, the run goes on: it reads from the store and says so once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from gkd_dist.errors import ShardError
from gkd_dist.shards.entries import ObjectEntry
from gkd_dist.storage import Storage
from gkd_dist.storage.local import LocalBackend

log = logging.getLogger(__name__)
_POLL_S = 0.02
_CRC_CHUNK_BYTES = 8 << 20


class CachedStorage(Storage):
    """A store of which ``objects`` are read through ``folder``; all else goes to the store itself.

    At most ``budget_bytes`` are kept in the folder, the least recently used objects going first. A
    process waits at most ``lock_timeout_s`` for another one's download and then reads by itself.
    Stores below it (`child`) are not cached: the keys of ``objects`` are relative to this one.
    """

    def __init__(
        self,
        storage: Storage,
        objects: Iterable[ObjectEntry],
        folder: str | Path,
        budget_bytes: int,
        lock_timeout_s: float = 300.0,
    ) -> None:
        super().__init__(storage.protocol, storage.root, storage.config, storage._backend)
        self.folder = Path(folder).absolute()
        self.budget_bytes = budget_bytes
        self.lock_timeout_s = lock_timeout_s
        self._objects = {entry.key: entry for entry in objects}
        self._checked: set[str] = set()  # digests of files that this process has checked
        self._disk = LocalBackend()
        self._writable = True

    def __reduce__(self) -> tuple[object, ...]:
        # a copy in another process, maybe on another node, has checked nothing yet
        store = Storage(self.protocol, self.root, self.config, self._backend)
        entries = tuple(self._objects.values())
        return CachedStorage, (store, entries, self.folder, self.budget_bytes, self.lock_timeout_s)

    def read(self, key: str) -> bytes:
        """The whole object."""
        entry = self._objects.get(key)
        return super().read(key) if entry is None else self.read_range(key, 0, entry.num_bytes)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)``; the first range of an object downloads all of it."""
        if key not in self._objects:
            return super().read_range(key, start, stop)
        buffer = bytearray(stop - start)
        return bytes(memoryview(buffer)[: self.read_into(key, buffer, start)])

    def read_into(self, key: str, buffer: bytearray | memoryview, start: int = 0) -> int:
        """Fills ``buffer`` from offset ``start``; the number of bytes read.

        Raises ShardError where the store has other bytes than the manifest says.
        """
        entry = self._objects.get(key)
        count = None if entry is None else self._fill(entry, memoryview(buffer), start)
        return super().read_into(key, buffer, start) if count is None else count

    def _fill(self, entry: ObjectEntry, view: memoryview, start: int) -> int | None:
        """Reads from the cache, after a download if need be; None where the cache cannot be used."""
        if entry.num_bytes > self.budget_bytes:
            return None
        try:
            count = self._from_disk(entry, view, start)
            if count is not None or not self._writable:
                return count
            with _locked(self._lock_path(entry), self.lock_timeout_s) as locked:
                if not locked:
                    log.warning(
                        "%s is still being downloaded after %.0f s; reading it directly", entry.key, self.lock_timeout_s
                    )
                    return None
                count = self._from_disk(entry, view, start)  # another process may have been faster
                return self._download(entry, view, start) if count is None else count
        except OSError as error:
            self._give_up(error)
            return None

    def _from_disk(self, entry: ObjectEntry, view: memoryview, start: int) -> int | None:
        """Reads a cached object that is known to be right; None where there is none."""
        path = self._object_path(entry)
        with contextlib.suppress(FileNotFoundError):  # never there, or evicted between two lines
            if entry.sha256 not in self._checked:
                if not self._check(path, entry):
                    return None
                self._checked.add(entry.sha256)
            count = self._disk.read_into(str(path), view, start)
            os.utime(path)  # the time of last use: access times are often switched off
            return count
        return None

    def _check(self, path: Path, entry: ObjectEntry) -> bool:
        """Whether a file found on disk is the object; one that is not is removed."""
        crc = 0
        with open(path, "rb") as file:
            while chunk := file.read(_CRC_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
            size = file.tell()
        if (size, crc) == (entry.num_bytes, entry.crc32):
            return True
        log.warning("%s in the cache is damaged; downloading %s again", path, entry.key)
        path.unlink(missing_ok=True)
        return False

    def _download(self, entry: ObjectEntry, view: memoryview, start: int) -> int:
        """Reads the object from the store, checks it, and keeps it if there is room."""
        data = self._verified_read(entry)
        try:
            self._keep(entry, data)
        except OSError as error:
            self._give_up(error)
        piece = data[start : start + len(view)]
        view[: len(piece)] = piece
        return len(piece)

    def _verified_read(self, entry: ObjectEntry) -> bytes:
        """The object from the store, read once more where it is not what the manifest describes."""
        for again in (False, True):
            data = super().read(entry.key)
            found = hashlib.sha256(data).hexdigest()
            if found == entry.sha256:
                return data
            if not again:
                log.warning("%s arrived altered: reading it once more", self.describe(entry.key))
        raise ShardError(
            f"{self.describe(entry.key)} was altered: got sha256 {found[:16]} of {len(data)} bytes, expected "
            f"{entry.sha256[:16]} of {entry.num_bytes}, in two reads; run `gkd verify`, then the stage that writes it "
            "again"
        )

    def _keep(self, entry: ObjectEntry, data: bytes) -> None:
        """Writes an object, making room for it first."""
        with _locked(self.folder / "room.lock", self.lock_timeout_s) as locked:
            if not locked:
                return
            for name in self._disk.list(str(self._objects_folder), leftovers=True):
                (self._objects_folder / name).unlink(missing_ok=True)
            self._make_room(entry.num_bytes)
            self._disk.write(str(self._object_path(entry)), data)
        self._checked.add(entry.sha256)

    def _make_room(self, num_bytes: int) -> None:
        """Removes the objects used longest ago until ``num_bytes`` more are within the budget."""
        names = self._disk.list(str(self._objects_folder))
        stats = [(self._objects_folder / name).stat() for name in names]
        oldest = sorted(zip((stat.st_mtime_ns for stat in stats), names, (stat.st_size for stat in stats), strict=True))
        excess = sum(stat.st_size for stat in stats) + num_bytes - self.budget_bytes
        for _, name, size in oldest:
            if excess <= 0:
                return
            (self._objects_folder / name).unlink(missing_ok=True)
            excess -= size

    def _give_up(self, error: OSError) -> None:
        """No more writes to the cache by this process; what is there stays in use."""
        if self._writable:
            log.warning("cannot cache in %s (%s); reading from %s instead", self.folder, error, self.url)
        self._writable = False

    @property
    def _objects_folder(self) -> Path:
        return self.folder / "objects"

    def _object_path(self, entry: ObjectEntry) -> Path:
        return self._objects_folder / entry.sha256

    def _lock_path(self, entry: ObjectEntry) -> Path:
        # 4096 lock files that are never removed: removing a lock file is a race of its own
        return self.folder / "locks" / entry.sha256[:3]


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[bool]:
    """Holds an exclusive lock on ``path``; False where it could not be had in time.

    The lock belongs to the open file, so it also holds between threads, and the system releases it
    when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with open(path, "ab") as file:
        while not (locked := _try_lock(file.fileno())) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield locked


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
