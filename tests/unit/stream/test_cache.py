"""The disk cache: one download per node, never a short file, never more than its budget."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cache_process import SlowBackend, open_store, read_at_once

from gkd_dist.errors import ObjectNotFoundError, ShardError
from gkd_dist.shards.manifest import ObjectEntry
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage
from gkd_dist.storage.local import LocalBackend
from gkd_dist.stream.cache import CachedStorage, NodeCache, locked


class Node:
    """A store with ``count`` objects and a cache folder, both under one temporary folder."""

    def __init__(self, root: Path, count: int = 1) -> None:
        self.root, self.log = root, root / "downloads"
        plain = Storage.open(str(root / "store"))
        self.tensors = [{"x": torch.arange(1000) + index, "y": torch.ones(3) * index} for index in range(count)]
        self.entries = [write_shard(plain, f"part-{i:05d}", tensors) for i, tensors in enumerate(self.tensors)]
        self.size = self.entries[0].num_bytes
        self.log.touch()

    def open(self, budget_bytes: int = 1 << 20, delay_s: float = 0.0, lock_timeout_s: float = 30.0) -> CachedStorage:
        cache = NodeCache(self.root / "cache", budget_bytes, lock_timeout_s)
        return CachedStorage(open_store(self.root, delay_s), self.entries, cache)

    def downloads(self) -> list[str]:
        return self.log.read_text().split()

    def cached(self) -> set[str]:
        folder = self.root / "cache" / "objects"
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    def path(self, index: int) -> Path:
        return self.root / "cache" / "objects" / self.entries[index].sha256


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def assert_reads(storage: Storage, entry: ObjectEntry, tensors: dict[str, torch.Tensor]) -> None:
    found = read_shard(storage, entry)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# --- hits and misses -------------------------------------------------------------------------


def test_an_object_is_downloaded_once(node: Node) -> None:
    for storage in (node.open(), node.open()):  # the second one is another process as far as it knows
        for _ in range(2):
            assert_reads(storage, node.entries[0], node.tensors[0])
    assert node.downloads() == [node.entries[0].key]


def test_ranges_come_from_the_same_copy(node: Node) -> None:
    storage, entry = node.open(), node.entries[0]
    assert torch.equal(read_shard(storage, entry, ["y"])["y"], node.tensors[0]["y"])
    whole = storage.read(entry.key)
    assert len(whole) == entry.num_bytes
    assert storage.read_range(entry.key, 10, 20) == whole[10:20]
    assert storage.read_range(entry.key, entry.num_bytes - 2, entry.num_bytes + 9) == whole[-2:]
    assert node.downloads() == [entry.key]


def test_what_no_manifest_names_is_not_cached(node: Node) -> None:
    storage = node.open()
    storage.write_json("manifest.json", {"a": 1})
    assert storage.read_json("manifest.json") == {"a": 1}
    storage.write_json("manifest.json", {"a": 2})
    assert storage.read_json("manifest.json") == {"a": 2}
    with pytest.raises(ObjectNotFoundError):
        storage.read_range("nothing", 0, 1)
    assert node.cached() == set()


def test_a_pickled_copy_trusts_nothing_yet(node: Node) -> None:
    storage, entry = node.open(), node.entries[0]
    storage.read(entry.key)
    flip(node.path(0))
    assert_reads(pickle.loads(pickle.dumps(storage)), entry, node.tensors[0])


# --- budget ----------------------------------------------------------------------------------


def test_the_least_recently_used_objects_go_first(tmp_path: Path) -> None:
    node = Node(tmp_path, count=3)
    storage = node.open(budget_bytes=2 * node.size + 10)
    for index in (0, 1, 0, 2):
        storage.read(node.entries[index].key)
        time.sleep(0.02)  # file times are coarse
    assert node.cached() == {node.entries[0].sha256, node.entries[2].sha256}
    assert_reads(storage, node.entries[1], node.tensors[1])
    assert node.cached() == {node.entries[1].sha256, node.entries[2].sha256}


def test_an_object_larger_than_the_budget_is_streamed(node: Node) -> None:
    storage = node.open(budget_bytes=node.size - 1)
    for _ in range(2):
        assert_reads(storage, node.entries[0], node.tensors[0])
    assert node.cached() == set()
    assert len(node.downloads()) == 2


def test_leftovers_of_killed_writers_are_removed(node: Node) -> None:
    leftover = node.path(0).with_name(".abc.1-2.gkd-tmp")
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    node.open().read(node.entries[0].key)
    assert node.cached() == {node.entries[0].sha256}


# --- damage ----------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_first(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 100)], ids=["flipped", "truncated"])
def test_a_damaged_copy_is_downloaded_again(node: Node, damage, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    node.open().read(node.entries[0].key)
    damage(node.path(0))
    assert_reads(node.open(), node.entries[0], node.tensors[0])
    assert len(node.downloads()) == 2
    assert "is damaged; downloading" in caplog.text


@pytest.mark.parametrize("names", [None, ["x"]], ids=["whole", "named"])
@pytest.mark.parametrize("damage", [flip_first, lambda path: os.truncate(path, 600)], ids=["flipped", "truncated"])
def test_a_copy_damaged_after_it_was_checked_is_downloaded_again(node: Node, damage, names) -> None:  # type: ignore[no-untyped-def]
    storage = node.open()
    assert_reads(storage, node.entries[0], node.tensors[0])
    damage(node.path(0))
    assert torch.equal(read_shard(storage, node.entries[0], names)["x"], node.tensors[0]["x"])
    assert len(node.downloads()) == 2


def test_what_was_damaged_on_its_way_is_downloaded_once_more(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, reads = SlowBackend.read_into, 0

    def read_into(self: SlowBackend, path: str, view: memoryview, start: int) -> int:
        nonlocal reads
        reads += 1
        count = real(self, path, view, start)
        view[count - 1] ^= reads == 1
        return count

    monkeypatch.setattr(SlowBackend, "read_into", read_into)
    assert_reads(node.open(), node.entries[0], node.tensors[0])
    assert reads == 2
    assert "arrived altered: reading it once more" in caplog.text


def test_a_damaged_object_is_refused_and_not_kept(node: Node) -> None:
    flip(node.root / "store" / node.entries[0].key)
    with pytest.raises(ShardError, match=rf"{node.entries[0].key} was altered: got sha256 .* run `gkd verify`"):
        node.open().read(node.entries[0].key)
    assert node.cached() == set()


# --- a disk that does not work ---------------------------------------------------------------


class FullDisk(LocalBackend):
    """Every write fails as on a full disk."""

    def write(self, path: str, data: bytes | bytearray | memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(tmp_path, count=2)
    storage = node.open()
    storage.cache.disk = FullDisk()
    with caplog.at_level(logging.WARNING):
        for index in (0, 1, 0):
            assert_reads(storage, node.entries[index], node.tensors[index])
    assert caplog.text.count("No space left on device") == 1
    assert len(node.downloads()) == 3


def test_a_folder_that_cannot_be_made_is_said_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    (node.root / "cache").write_text("a file where the folder should be")
    storage = node.open()
    for _ in range(2):
        assert_reads(storage, node.entries[0], node.tensors[0])
    assert caplog.text.count("cannot cache in") == 1


def test_a_stuck_download_of_another_process_is_not_waited_for_forever(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    storage = node.open(lock_timeout_s=0.1)
    with locked(storage.cache.lock_path(node.entries[0]), 1.0) as mine:
        assert mine
        started = time.monotonic()
        assert_reads(storage, node.entries[0], node.tensors[0])
        assert time.monotonic() - started < 5
    assert "still being downloaded after" in caplog.text


def test_a_process_that_is_stopped_while_it_writes_costs_the_copy_alone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkd_dist.stream.cache._ROOM_S", 0.1)
    storage = node.open(lock_timeout_s=30.0)
    with locked(storage.cache.folder / "room.lock", 1.0) as mine:
        assert mine
        started = time.monotonic()
        assert_reads(storage, node.entries[0], node.tensors[0])
        assert time.monotonic() - started < 5
        assert not storage.cache.path(node.entries[0]).exists()
    assert_reads(storage, node.entries[0], node.tensors[0])
    assert storage.cache.path(node.entries[0]).exists()


# --- many processes --------------------------------------------------------------------------


@pytest.mark.parametrize("objects_in_budget", [2, 1])
def test_eight_processes_never_see_a_short_file(tmp_path: Path, objects_in_budget: int) -> None:
    """And download once, unless the budget makes them throw away what others are about to read."""
    node = Node(tmp_path, count=2)
    (tmp_path / "entries").write_bytes(pickle.dumps(node.entries))
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(8), spawn.Queue()
    arguments = (str(tmp_path), objects_in_budget * node.size + 10, barrier, results)
    processes = [spawn.Process(target=read_at_once, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert found == [[(entry.num_bytes, entry.sha256) for entry in node.entries]] * 8
    if objects_in_budget == 2:
        assert sorted(node.downloads()) == sorted(entry.key for entry in node.entries)


# --- the rest of the disk --------------------------------------------------------------------


def test_some_of_the_disk_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for one object beside what is left free: the second one takes the place of the first."""
    node = Node(tmp_path, count=2)
    total = 100 * node.size

    def usage(folder: Path) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
        return SimpleNamespace(total=total, free=6.5 * node.size - used)

    monkeypatch.setattr("gkd_dist.stream.cache.shutil.disk_usage", usage)
    storage = node.open()
    for index in (0, 1):
        assert_reads(storage, node.entries[index], node.tensors[index])
    assert node.cached() == {node.entries[1].sha256}


def test_stores_of_one_process_say_once_that_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(tmp_path, count=2)
    first = node.open()
    first.cache.disk = FullDisk()
    second = CachedStorage(open_store(tmp_path), node.entries, first.cache)
    with caplog.at_level(logging.WARNING):
        assert_reads(first, node.entries[0], node.tensors[0])
        assert_reads(second, node.entries[1], node.tensors[1])
    assert caplog.text.count("cannot cache in") == 1


def test_a_folder_that_can_only_be_read_serves_what_it_has(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_reads(node.open(), node.entries[0], node.tensors[0])

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert_reads(node.open(), node.entries[0], node.tensors[0])
    assert len(node.downloads()) == 1
