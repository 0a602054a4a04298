"""Re-hashes a store against its manifest, and finds what no manifest names.

The logic of ``gkd verify``: it trusts nothing but the manifest and reads every byte.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gkd_dist.errors import ObjectNotFoundError
from gkd_dist.shards.manifest import Manifest, ObjectEntry, page_keys
from gkd_dist.storage import Storage

# Only what stages write: shards and pages of manifests, by their name, and folders of layer outputs.
# Other files, and other stores further down, are never touched.
_WRITTEN_BY_STAGES = re.compile(r"[^/]+-[0-9a-f]{8}\.safetensors|manifest-\d{4,}-[0-9a-f]{8}\.json|tmp-[0-9a-f]{8}/.+")


@dataclass(frozen=True)
class Problem:
    """What is wrong with one object: ``kind`` is ``missing``, ``truncated`` or ``altered``."""

    key: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.key} is {self.kind}: {self.detail}"


def verify_store(storage: Storage, manifest: Manifest, threads: int = 4) -> list[Problem]:
    """Every object that is not what the manifest says, in the manifest's order.

    Reads all objects whole, ``threads`` at a time, and compares size, crc32, sha256 and the crc32
    of each tensor. StorageError where the store cannot be read at all.
    """
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="gkd-verify") as pool:
        found = pool.map(lambda entry: _verify_object(storage, entry), manifest.parts)
        return [problem for problem in found if problem is not None]


def orphans(storage: Storage, manifest: Manifest) -> list[str]:
    """Shards and pages that the manifest does not name, layer outputs, and what killed writers left behind.

    ``manifest`` is the one that is stored there. They come from repeated tasks, from runs with
    other settings and from runs that were given up.
    Call it while no stage is writing here.
    """
    named = {entry.key for entry in manifest.parts} | page_keys(storage, manifest.kind)
    shards = [key for key in storage.list() if key not in named and _WRITTEN_BY_STAGES.fullmatch(key)]
    leftovers = [key for key in storage.list(leftovers=True) if "/" not in key or key.startswith("tmp-")]
    return sorted({*shards, *leftovers})


def prune(storage: Storage, manifest: Manifest) -> list[str]:
    """Deletes the `orphans` and returns their keys."""
    keys = orphans(storage, manifest)
    for key in keys:
        storage.delete(key)
    return keys


def _verify_object(storage: Storage, entry: ObjectEntry) -> Problem | None:
    buffer = bytearray(entry.num_bytes + 1)  # one more, to notice a longer object
    try:
        got = storage.read_into(entry.key, buffer)
    except ObjectNotFoundError:
        return Problem(entry.key, "missing", "the manifest names it, the store does not have it")
    if got < entry.num_bytes:
        return Problem(entry.key, "truncated", f"{got} bytes, expected {entry.num_bytes}")
    if got > entry.num_bytes:
        return Problem(entry.key, "altered", f"longer than the expected {entry.num_bytes} bytes")
    view = memoryview(buffer)[: entry.num_bytes]
    sha256 = hashlib.sha256(view).hexdigest()
    if sha256 != entry.sha256:
        return Problem(entry.key, "altered", f"sha256 {sha256[:16]}…, expected {entry.sha256[:16]}…")
    if zlib.crc32(view) != entry.crc32:
        return Problem(entry.key, "altered", f"crc32 {zlib.crc32(view):08x}, expected {entry.crc32:08x}")
    wrong = [t.name for t in entry.tensors if zlib.crc32(view[t.start : t.stop]) != t.crc32]
    return Problem(entry.key, "altered", f"crc32 of tensors {', '.join(wrong)}") if wrong else None
