"""Storage, shards and ownership on a real S3 server (moto), and what happens when it is not there."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gkd_dist.config import StorageConfig
from gkd_dist.errors import ManifestError, ObjectNotFoundError, ShardError, StorageError
from gkd_dist.owner import Ownership
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage
from gkd_dist.verify import orphans, prune, verify_store

pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
pytest.importorskip("moto", reason="needs the extra: pip install 'gkd_dist[dev]'")

MIB = 1 << 20


@pytest.fixture
def store(s3_server: str) -> Storage:
    return Storage.open("s3://bucket/run", StorageConfig(retries=1, timeout_s=10))


def test_objects_are_written_read_by_range_listed_and_deleted(store: Storage) -> None:
    store.check_writable()
    store.write("a/b.bin", b"0123456789")
    store.write("a/empty", b"")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/empty") == b""
    assert store.read_range("a/b.bin", 2, 5) == b"234"
    assert store.read_range("a/b.bin", 8, 99) == b"89"
    assert store.read_range("a/b.bin", 10, 12) == b""
    assert store.size("a/b.bin") == 10
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert not store.exists("a/c")
    assert store.list() == ["a/b.bin", "a/empty"]
    assert store.child("a").list() == ["b.bin", "empty"]
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    store.delete_tree("a")
    assert store.list() == []


def test_overwritten_objects_are_seen_at_once(store: Storage) -> None:
    for number in range(3):
        store.write_json("value.json", {"number": number})
        assert store.read_json("value.json") == {"number": number}
        assert store.list() == ["value.json"]


def test_large_objects_arrive_whole_through_several_requests(store: Storage) -> None:
    data = os.urandom(41 * MIB)  # two batches of ranges, the second one short
    store.write("large.bin", memoryview(data))
    buffer = bytearray(len(data) + 1)
    assert store.read_into("large.bin", buffer) == len(data)
    assert bytes(buffer[:-1]) == data
    assert store.read("large.bin") == data
    assert store.read_into("large.bin", memoryview(buffer)[: 9 * MIB], start=35 * MIB) == 6 * MIB
    assert bytes(buffer[: 6 * MIB]) == data[35 * MIB :]


def test_reads_from_many_threads(store: Storage) -> None:
    for number in range(8):
        store.write(f"{number}", bytes([number]) * 1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.read, [str(number % 8) for number in range(64)]))
    assert found == [bytes([number % 8]) * 1000 for number in range(64)]


def test_a_copy_works_in_another_process_and_after_a_fork(store: Storage) -> None:
    store.write("key", b"value")
    program = "import pickle, sys; sys.stdout.buffer.write(pickle.loads(sys.stdin.buffer.read()).read('key'))"
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(store), capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b"value"
    child = os.fork()
    if child == 0:
        os._exit(0 if store.read("key") == b"value" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_endpoint_may_come_from_the_config(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    store = Storage.open("s3://bucket/run", StorageConfig(options={"s3": {"endpoint_url": s3_server}}))
    store.write("key", b"value")
    assert store.read("key") == b"value"


def test_missing_keys_and_buckets_are_told_apart(store: Storage, s3_server: str) -> None:
    with pytest.raises(ObjectNotFoundError, match="s3://bucket/run/nothing: there is no such object"):
        store.read("nothing")
    with pytest.raises(ObjectNotFoundError, match="nothing"):
        store.size("nothing")
    elsewhere = Storage.open("s3://nowhere/run")
    for action in (elsewhere.check_writable, lambda: elsewhere.read("key")):
        with pytest.raises(StorageError, match="the bucket does not exist; create it"):
            action()


def test_a_store_of_shards_is_written_verified_and_pruned(store: Storage) -> None:
    graph = store.child("graph")
    entry = write_shard(graph, "part-00000", {"x": torch.randn(100, 8).bfloat16(), "n_id": torch.arange(100)})
    other = write_shard(graph, "part-00000", {"n_id": torch.arange(3)})
    Manifest("graph", "f" * 64, parts=(entry,)).save(graph)
    manifest = Manifest.load(graph, "graph")
    assert torch.equal(read_shard(graph, manifest.parts[0], ["n_id"])["n_id"], torch.arange(100))
    assert read_shard(graph, manifest.parts[0])["x"].dtype == torch.bfloat16
    assert verify_store(graph, manifest) == []
    assert orphans(graph, manifest) == [other.key]
    assert prune(graph, manifest) == [other.key]
    assert graph.list() == ["manifest.json", entry.key]


def test_damage_on_s3_is_named(store: Storage) -> None:
    entry = write_shard(store, "part-00000", {"x": torch.arange(1000)})
    with pytest.raises(ManifestError, match="there is no graph store"):
        Manifest.load(store, "graph")
    data = bytearray(store.read(entry.key))
    store.write(entry.key, data[:100])
    with pytest.raises(ShardError, match="truncated: got 100 bytes"):
        read_shard(store, entry)
    with pytest.raises(ShardError, match="truncated"):
        read_shard(store, entry, ["x"])
    data[-1] ^= 1
    store.write(entry.key, data)
    with pytest.raises(ShardError, match="altered: got crc32"):
        read_shard(store, entry, ["x"])
    store.delete(entry.key)
    with pytest.raises(ShardError, match="is missing"):
        read_shard(store, entry)


def test_ownership_on_s3(store: Storage) -> None:
    with Ownership(store) as owner:
        owner.check()
        assert store.exists("owner.json")
    assert not store.exists("owner.json")


# --- stores that do not answer ---------------------------------------------------------------


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)
        for connection in connections:
            connection.close()


def test_a_silent_endpoint_is_given_up_in_bounded_time(s3_server: str, silent_endpoint: str) -> None:
    config = StorageConfig(options={"s3": {"endpoint_url": silent_endpoint}}, retries=1, timeout_s=1)
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"after 2 attempts: the store did not answer in time .*storage.timeout_s"):
        Storage.open("s3://bucket/run", config).check_writable()
    assert 2 <= time.monotonic() - begin < 8


def test_a_closed_port_is_given_up_in_bounded_time(s3_server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = StorageConfig(options={"s3": {"endpoint_url": f"http://127.0.0.1:{port}"}}, retries=4, timeout_s=30)
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"after 2 attempts: the store cannot be reached .*check the endpoint"):
        Storage.open("s3://bucket/run", config).check_writable()
    assert time.monotonic() - begin < 10


_WRITE_BIG = """
import re, sys
from pathlib import Path
from gkd_dist.config import StorageConfig
from gkd_dist.storage import Storage
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) << 10
store = Storage.open("s3://bucket/run", StorageConfig(upload_part_bytes=5 << 20, uploads_at_once=2))
store.write("warm", bytes(11 << 20))
data = bytearray(b"x" * (96 << 20))
Path("/proc/self/clear_refs").write_text("5")
before = peak()
store.write("big", memoryview(data))
print(peak() - before, store.size("big"))
"""


@pytest.mark.usefixtures("s3_server")
def test_a_big_object_goes_up_without_a_copy_in_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _WRITE_BIG], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size == 96 * MIB
    assert peak < 48 * MIB  # two parts of 5 MiB, and what the HTTP client buffers of them
