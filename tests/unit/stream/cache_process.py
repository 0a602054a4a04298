"""What one of many processes does in the test of the cache; imports no torch, so that it starts fast."""

from __future__ import annotations

import hashlib
import pickle
import time
from pathlib import Path

from gkd_dist.storage import Storage
from gkd_dist.storage.local import LocalBackend
from gkd_dist.stream.cache import CachedStorage, NodeCache


class SlowBackend(LocalBackend):
    """A file store that is slow and leaves a line in a log for every object it is read from."""

    def __init__(self, log: Path, delay_s: float = 0.0) -> None:
        self.log, self.delay_s = log, delay_s

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        self._note(path)
        return super().read(path, start, stop)

    def read_into(self, path: str, view: memoryview, start: int) -> int:
        self._note(path)
        return super().read_into(path, view, start)

    def _note(self, path: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{Path(path).name}\n")
        time.sleep(self.delay_s)


def open_store(root: Path, delay_s: float = 0.0) -> Storage:
    """The store of a test's folder behind a `SlowBackend`."""
    plain = Storage.open(str(root / "store"))
    return Storage(plain.protocol, plain.root, plain.config, SlowBackend(root / "downloads", delay_s))


def read_at_once(root: str, budget_bytes: int, barrier, results) -> None:  # type: ignore[no-untyped-def]
    """Reads all objects of ``root`` when all processes are ready; reports (size, digest) of each."""
    entries = pickle.loads((Path(root) / "entries").read_bytes())
    store = open_store(Path(root), delay_s=0.3)  # long enough for all to find the cache empty
    storage = CachedStorage(store, entries, NodeCache(Path(root) / "cache", budget_bytes))
    barrier.wait(60)
    found = []
    for entry in entries:
        data = storage.read(entry.key)
        found.append((len(data), hashlib.sha256(data).hexdigest()))
    results.put(found)
