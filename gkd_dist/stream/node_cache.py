"""Which folder of a machine caches what is read from a store, and stores that are read through it.

Decided on each machine by itself: temporary folders differ.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gkd_dist.config import CacheConfig
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.cache import CachedStorage, NodeCache
from gkd_dist.stream.ensemble import Ensemble

log = logging.getLogger(__name__)
Knowledge = tuple[Storage, Manifest] | Ensemble | None
LOCK_SHARE = 0.25  # of the time that a unit may take
_LOCAL = ("file", "memory")
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")


def is_cached(storage: Storage, config: CacheConfig) -> bool:
    """Whether ``config`` wants a cache for a store; nothing of the machine is looked at."""
    if config.folder == "auto":
        return storage.protocol not in _LOCAL
    return config.folder is not None and storage.protocol != "memory"


def describe_cache(storages: Iterable[Storage], config: CacheConfig) -> str | None:
    """A line that says what is cached and where; None where nothing is."""
    urls = [storage.url for storage in storages if is_cached(storage, config)]
    if not urls:
        return None
    where = "its temporary folder" if config.folder == "auto" else config.folder
    return f"each machine keeps what it reads from {', '.join(urls)} in {where}, up to {config.budget_bytes:,} bytes"


def stores_of(graph: GraphStore, knowledge: Knowledge) -> list[Storage]:
    """The stores that training reads."""
    stored = knowledge.stores.values() if isinstance(knowledge, Ensemble) else [knowledge] if knowledge else []
    return [graph.storage, *(storage for storage, _ in stored)]


def through_cache(
    graph: GraphStore, knowledge: Knowledge, config: CacheConfig, timeout_s: float
) -> tuple[GraphStore, Knowledge]:
    """The same stores, read through the cache of this machine where there is one.

    ``timeout_s`` bounds the wait for a unit; a wait for another process takes at most `LOCK_SHARE` of it, so that
    there is time left to read the store.
    """
    cache: NodeCache | None = None
    if any(is_cached(storage, config) for storage in stores_of(graph, knowledge)):
        cache = _open(config, LOCK_SHARE * timeout_s)
    if cache is None:
        return graph, knowledge

    def cached(storage: Storage, manifest: Manifest) -> Storage:
        return CachedStorage(storage, manifest.parts, cache) if is_cached(storage, config) else storage

    graph = GraphStore(cached(graph.storage, graph.manifest), graph.manifest)
    if isinstance(knowledge, Ensemble):
        stores = knowledge.stores.items()
        return graph, Ensemble({name: (cached(*stored), stored[1]) for name, stored in stores})
    return graph, None if knowledge is None else (cached(*knowledge), knowledge[1])


def _open(config: CacheConfig, lock_timeout_s: float) -> NodeCache | None:
    """The cache of this machine; None, with a warning, where its temporary folder is no place for one."""
    if config.folder != "auto":
        return NodeCache(str(config.folder), config.budget_bytes, lock_timeout_s)
    folder = Path(tempfile.gettempdir()) / f"gkd-cache-{os.getuid()}"
    problem = _unfit(folder)
    if problem is None:
        return NodeCache(folder, config.budget_bytes, lock_timeout_s)
    log.warning("nothing is cached: %s; set cache.folder to a folder on a disk of every machine, or to null", problem)
    return None


def _unfit(folder: Path) -> str | None:
    """What is wrong with a folder that was not chosen by the user."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return f"{folder} belongs to somebody else"
    kind = file_system(folder)
    return f"{folder} lies in memory ({kind})" if kind in _IN_MEMORY else None


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Type of the file system that holds ``folder``, e.g. ``ext4``; empty where the system does not say."""
    best, kind = -1, ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    parts = folder.resolve().parts
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].replace("\\040", " ")).parts
        if parts[: len(point)] == point and len(point) >= best:  # of mounts upon each other the last counts
            best, kind = len(point), right.split()[0]
    return kind
