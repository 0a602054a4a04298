"""Which stores are cached where, decided without touching them."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from pathlib import Path

import pytest
from stream_stores import graph_store, random_graph

from gkd_dist.config import CacheConfig
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.cache import CachedStorage
from gkd_dist.stream.ensemble import Ensemble
from gkd_dist.stream.node_cache import describe_cache, file_system, is_cached, stores_of, through_cache

MANIFEST = Manifest("graph", "f" * 64)
MIB = 1 << 20


def store(url: str) -> GraphStore:
    return GraphStore(Storage.open(url), MANIFEST)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize(
    ("url", "folder", "expected"),
    [
        ("/data/graph", "auto", False),
        ("memory://graph", "auto", False),
        ("s3://bucket/graph", "auto", True),
        ("gs://bucket/graph", "auto", True),
        ("/mnt/slow/graph", "/scratch", True),
        ("memory://graph", "/scratch", False),
        ("s3://bucket/graph", None, False),
    ],
)
def test_what_is_cached(url: str, folder: str | None, expected: bool) -> None:
    config = CacheConfig(folder=folder)
    assert is_cached(store(url).storage, config) is expected
    line = describe_cache([store(url).storage], config)
    assert (line is not None) is expected
    graph, _ = through_cache(store(url), None, config, 240.0)
    assert isinstance(graph.storage, CachedStorage) is expected


def test_graph_and_knowledge_share_one_cache(tmp_path: Path) -> None:
    remote, local = store("s3://bucket/k").storage, store(str(tmp_path)).storage
    config = CacheConfig(budget_bytes=MIB)
    graph, knowledge = through_cache(store("s3://bucket/g"), (remote, MANIFEST), config, 240.0)
    assert isinstance(knowledge, tuple)
    assert isinstance(graph.storage, CachedStorage)
    assert isinstance(knowledge[0], CachedStorage)
    assert graph.storage.cache is knowledge[0].cache
    assert graph.storage.cache.folder == tmp_path / f"gkd-cache-{os.getuid()}"
    assert graph.storage.cache.budget_bytes == MIB
    copied = pickle.loads(pickle.dumps((graph, knowledge)))
    assert copied[0].storage.cache is copied[1][0].cache, "a process must say only once that its disk is full"
    ensemble = Ensemble({"a": (remote, MANIFEST), "b": (local, MANIFEST)})
    _, found = through_cache(store(str(tmp_path)), ensemble, config, 240.0)
    assert isinstance(found, Ensemble)
    assert [type(one) for one, _ in found.stores.values()] == [CachedStorage, Storage]
    assert len(stores_of(graph, ensemble)) == 3


def test_what_is_read_through_it_lies_in_the_folder(tmp_path: Path) -> None:
    plain = graph_store(random_graph(), 2, 1, tmp_path / "store")
    cached, _ = through_cache(plain, None, CacheConfig(folder=str(tmp_path / "cache")), 240.0)
    assert cached.part(0).keys() == plain.part(0).keys()
    assert [path.name for path in (tmp_path / "cache/objects").iterdir()] == [plain.manifest.parts[0].sha256]


def test_a_wait_for_another_process_leaves_time_to_read_the_store(tmp_path: Path) -> None:
    for folder in ("auto", str(tmp_path / "cache")):
        graph, _ = through_cache(store("s3://bucket/g"), None, CacheConfig(folder=folder), 8.0)
        assert isinstance(graph.storage, CachedStorage)
        assert graph.storage.cache.lock_timeout_s == 2.0


def test_a_temporary_folder_in_memory_is_no_disk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gkd_dist.stream.node_cache.file_system", lambda folder: "tmpfs")
    with caplog.at_level(logging.WARNING):
        graph, _ = through_cache(store("s3://bucket/g"), None, CacheConfig(), 240.0)
    assert not isinstance(graph.storage, CachedStorage)
    assert "lies in memory (tmpfs); set cache.folder" in caplog.text


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"gkd-cache-{os.getuid()}").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        graph, _ = through_cache(store("s3://bucket/g"), None, CacheConfig(), 240.0)
    assert not isinstance(graph.storage, CachedStorage)
    assert "belongs to somebody else" in caplog.text


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 27 0:25 / /mnt/a rw shared:1 - tmpfs none rw\n"
        "31 27 0:26 / /mnt/ab rw - xfs /dev/b rw\n"
        "32 30 0:27 / /mnt/with\\040space rw - ramfs none rw\n"
    )
    assert file_system(Path("/mnt/a/folder"), mounts) == "tmpfs"
    assert file_system(Path("/mnt/ab/folder"), mounts) == "xfs"
    assert file_system(Path("/mnt/with space"), mounts) == "ramfs"
    assert file_system(Path("/mnt"), mounts) == "ext4"
    assert file_system(Path("/"), tmp_path / "nothing") == ""


def test_a_relative_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="use an absolute path, auto or null"):
        CacheConfig(folder="cache")
