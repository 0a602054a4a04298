"""A node-local disk cache for shards of remote stores, shared by all processes of a node.

::

    <folder>/objects/<sha256>     whole objects, named by their content, so that none is ever stale
    <folder>/locks/<3 digits>     one download per object and node
    <folder>/room.lock            held while room is made and an object is written

Only objects that a manifest names are cached: their digest says what they have to be. An object is
checked by sha256 when it is downloaded, by crc32 when a process first reads it from disk, and again when
its reader doubts it. Files appear whole or not at all (temporary file, fsync, rename); a reader of an evicted
file keeps it open to the end. The folder has to be on a local disk, because `flock` is not reliable elsewhere.

Whatever is wrong with the disk, the run goes on: it reads from the store and says so once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
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
_ROOM_S = 5.0  # patience with another process that writes: what was read is not lost
_CRC_CHUNK_BYTES = 8 << 20
_FREE_BYTES, _FREE_SHARE = 1 << 30, 0.05  # left to others on the disk: the smaller of both


class NodeCache:
    """The folder of a node as one process sees it; several stores of the process share it.

    At most ``budget_bytes`` are kept in the folder, the least recently used objects going first, and some of
    the disk is left free. A process waits at most ``lock_timeout_s`` for another one's download and then
    reads by itself, and some seconds for room, without which it does not keep what it has read.
    """

    def __init__(self, folder: str | Path, budget_bytes: int, lock_timeout_s: float = 60.0) -> None:
        self.folder = Path(folder).absolute()
        self.budget_bytes = budget_bytes
        self.lock_timeout_s = lock_timeout_s
        self.checked: set[str] = set()  # digests of files that this process has checked
        self.writable = True
        self.disk = LocalBackend()

    def __reduce__(self) -> tuple[object, ...]:
        # a copy in another process, maybe on another node, has checked nothing yet
        return NodeCache, (self.folder, self.budget_bytes, self.lock_timeout_s)

    @property
    def objects(self) -> Path:
        """Where the objects are."""
        return self.folder / "objects"

    def path(self, entry: ObjectEntry) -> Path:
        """File of an object."""
        return self.objects / entry.sha256

    def lock_path(self, entry: ObjectEntry) -> Path:
        """File whose lock is held while the object is downloaded."""
        # 4096 lock files that are never removed: removing a lock file is a race of its own
        return self.folder / "locks" / entry.sha256[:3]

    def read(self, entry: ObjectEntry, view: memoryview, start: int) -> int | None:
        """Fills ``view`` from an object that is known to be right; None where there is none."""
        path = self.path(entry)
        with contextlib.suppress(FileNotFoundError):  # never there, or evicted between two lines
            if entry.sha256 in self.checked:
                count = self.disk.read_into(str(path), view, start)
            elif (found := self._first_read(path, entry, view, start)) is not None:
                count = found
            else:
                log.warning("%s in the cache is damaged; downloading %s again", path, entry.key)
                path.unlink(missing_ok=True)
                return None
            with contextlib.suppress(OSError):  # a folder that can only be read serves as well
                os.utime(path)  # the time of last use: access times are often switched off
            return count
        return None

    def _first_read(self, path: Path, entry: ObjectEntry, view: memoryview, start: int) -> int | None:
        """The same for a file that this process has not read yet; None where it is not the object."""
        whole = start == 0 and len(view) >= entry.num_bytes
        count = crc = 0
        if whole:
            count, size = self.disk.read_into(str(path), view, 0), os.stat(path).st_size
            crc = zlib.crc32(view[:count])
        else:
            with open(path, "rb") as file:
                while chunk := file.read(_CRC_CHUNK_BYTES):
                    crc = zlib.crc32(chunk, crc)
                size = file.tell()
        if (size, crc) != (entry.num_bytes, entry.crc32):
            return None
        self.checked.add(entry.sha256)
        return count if whole else self.disk.read_into(str(path), view, start)

    def keep(self, entry: ObjectEntry, data: memoryview) -> None:
        """Writes an object, making room for it first; `OSError` where the disk does not take it."""
        with locked(self.folder / "room.lock", min(_ROOM_S, self.lock_timeout_s)) as mine:
            if not mine:
                log.info("%s is not kept: another process has been writing for %.0f s", entry.key, _ROOM_S)
                return
            for name in self.disk.list(str(self.objects), leftovers=True):
                (self.objects / name).unlink(missing_ok=True)
            self._make_room(entry.num_bytes)
            self.disk.write(str(self.path(entry)), data)
        self.checked.add(entry.sha256)

    def _make_room(self, num_bytes: int) -> None:
        """Removes the objects used longest ago until ``num_bytes`` more are within the budget and the disk."""
        names = self.disk.list(str(self.objects))
        stats = [(self.objects / name).stat() for name in names]
        oldest = sorted(zip((stat.st_mtime_ns for stat in stats), names, (stat.st_size for stat in stats), strict=True))
        usage = shutil.disk_usage(self.folder)
        reserve = min(_FREE_BYTES, int(_FREE_SHARE * usage.total))
        excess = max(
            sum(stat.st_size for stat in stats) + num_bytes - self.budget_bytes, num_bytes + reserve - usage.free
        )
        for _, name, size in oldest:
            if excess <= 0:
                return
            (self.objects / name).unlink(missing_ok=True)
            excess -= size
        if excess > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def give_up(self, error: OSError, url: str) -> None:
        """No more writes to the cache by this process; what is there stays in use."""
        if self.writable:
            log.warning(
                "cannot cache in %s (%s); reading from %s instead: make room there, or set cache.folder to a folder "
                "on another disk",
                self.folder,
                error.strerror or error,
                url,
            )
        self.writable = False


class CachedStorage(Storage):
    """A store of which ``objects`` are read through ``cache``; all else goes to the store itself.

    Stores below it (`child`) are not cached: the keys of ``objects`` are relative to this one.
    """

    def __init__(self, storage: Storage, objects: Iterable[ObjectEntry], cache: NodeCache) -> None:
        super().__init__(storage.protocol, storage.root, storage.config, storage._backend)
        self.cache = cache
        self._objects = {entry.key: entry for entry in objects}

    def __reduce__(self) -> tuple[object, ...]:
        store = Storage(self.protocol, self.root, self.config, self._backend)
        return CachedStorage, (store, tuple(self._objects.values()), self.cache)

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

    def doubt(self, key: str) -> None:
        """The copy on disk is checked at the next read, and downloaded again where it is not the object."""
        if key in self._objects:
            self.cache.checked.discard(self._objects[key].sha256)

    def _fill(self, entry: ObjectEntry, view: memoryview, start: int) -> int | None:
        """Reads from the cache, after a download if need be; None where the cache cannot be used."""
        cache = self.cache
        if entry.num_bytes > cache.budget_bytes:
            return None
        try:
            count = cache.read(entry, view, start)
            if count is not None or not cache.writable:
                return count
            with locked(cache.lock_path(entry), cache.lock_timeout_s) as mine:
                if not mine:
                    log.warning(
                        "%s is still being downloaded after %.0f s; reading it directly",
                        entry.key,
                        cache.lock_timeout_s,
                    )
                    return None
                count = cache.read(entry, view, start)  # another process may have been faster
                return self._download(entry, view, start) if count is None else count
        except OSError as error:
            cache.give_up(error, self.url)
            return None

    def _download(self, entry: ObjectEntry, view: memoryview, start: int) -> int:
        """Reads the object from the store, checks it, and keeps it if there is room."""
        whole = start == 0 and len(view) >= entry.num_bytes
        data = view[: entry.num_bytes] if whole else memoryview(bytearray(entry.num_bytes))
        self._verified_read(entry, data)
        try:
            self.cache.keep(entry, data)
        except OSError as error:
            self.cache.give_up(error, self.url)
        if whole:
            return len(data)
        piece = data[start : start + len(view)]
        view[: len(piece)] = piece
        return len(piece)

    def _verified_read(self, entry: ObjectEntry, data: memoryview) -> None:
        """Fills ``data`` from the store, once more where that is not what the manifest describes."""
        for again in (False, True):
            count = super().read_into(entry.key, data)
            found = hashlib.sha256(data[:count]).hexdigest()
            if found == entry.sha256:
                return
            if not again:
                log.warning("%s arrived altered: reading it once more", self.describe(entry.key))
        raise ShardError(
            f"{self.describe(entry.key)} was altered: got sha256 {found[:16]} of {count} bytes, expected "
            f"{entry.sha256[:16]} of {entry.num_bytes}, in two reads; run `gkd verify`, then the stage that writes it "
            "again"
        )


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[bool]:
    """Holds an exclusive lock on ``path``; False where it could not be had in time.

    The lock belongs to the open file, so it also holds between threads, and the system releases it
    when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with open(path, "ab") as file:
        while not (mine := _try_lock(file.fileno())) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield mine


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
