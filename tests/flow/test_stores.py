"""One suite over every kind of store, each on a real server where it is not local."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import object_servers
import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy
from object_servers import BUCKET
from store_runs import Run, Undisturbed

from gkd_dist.config import StorageConfig
from gkd_dist.errors import ObjectNotFoundError, StorageError
from gkd_dist.storage import Storage
from gkd_dist.storage import errors as storage_errors

MIB = 1 << 20
KINDS = ("file", "memory", "s3", "s3, obstore", "gs", "abfs")
REMOTE = ("s3", "gs", "abfs")


@dataclass
class Place:
    """Where a kind of store is, and how its client is set up."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    native: bool = False

    def open(self, prefix: str = "run", **config: Any) -> Storage:
        """A store below the root."""
        protocol = self.url.partition(":")[0]
        settings = {"retries": 1, "timeout_s": 10, "options": {protocol: self.options}, "native_reads": self.native}
        return Storage.open(f"{self.url}/{prefix}", StorageConfig(**{**settings, **config}))


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, request.param, tmp_path)


@pytest.fixture(params=REMOTE)
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, request.param, tmp_path)


def make_place(request: pytest.FixtureRequest, kind: str, folder: Path) -> Place:
    if kind == "file":
        return Place(f"file://{folder}")
    if kind == "memory":
        return Place(f"memory://{uuid.uuid4().hex}")
    if kind == "s3, obstore":
        pytest.importorskip("obstore", reason="needs the extra: pip install 'gkd_dist[fast]'")
    if kind.startswith("s3"):
        pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
        pytest.importorskip("moto", reason="needs the extra: pip install 'gkd_dist[dev]'")
    protocol = kind.partition(",")[0]
    request.getfixturevalue({"s3": "s3_server", "gs": "gs_server", "abfs": "azure_server"}[protocol])
    return Place(f"{protocol}://{BUCKET}", {"token": "anon"} if kind == "gs" else {}, native="obstore" in kind)


@pytest.fixture
def store(place: Place) -> Storage:
    return place.open()


def test_what_is_written_is_read_found_and_deleted(store: Storage) -> None:
    store.check_writable()
    store.write("a/b.bin", b"0123456789")
    store.write("a/empty", b"")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/empty") == b""
    assert (store.size("a/b.bin"), store.size("a/empty")) == (10, 0)
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert not store.exists("a/c")
    assert store.list() == ["a/b.bin", "a/empty"]
    assert store.child("a").list() == ["b.bin", "empty"]
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    store.delete_tree("a")
    store.delete_tree("a")
    assert store.list() == []


@pytest.mark.parametrize(("start", "stop", "expected"), [(2, 5, b"234"), (0, 10, b"0123456789"), (8, 99, b"89"),
                                                         (10, 12, b""), (50, 60, b""), (3, 3, b"")])  # fmt: skip
def test_ranges_are_slices(store: Storage, start: int, stop: int, expected: bytes) -> None:
    store.write("key", b"0123456789")
    assert store.read_range("key", start, stop) == expected
    buffer = bytearray(stop - start)
    assert store.read_into("key", buffer, start) == len(expected)
    assert buffer[: len(expected)] == expected


def test_overwritten_objects_are_seen_at_once_by_another_reader(place: Place, store: Storage) -> None:
    other = place.open()
    for number in range(3):
        store.write_json("value.json", {"number": number})
        assert other.read_json("value.json") == {"number": number}
        assert other.list() == ["value.json"]
    store.write("value.json", b"")
    assert other.read("value.json") == b""


@pytest.mark.parametrize("key", ["Straße/ключ/部分.bin", "with space/a+b%20c&d=e#f.bin"])
def test_keys_are_any_names(store: Storage, key: str) -> None:
    store.write(key, b"value")
    assert store.read(key) == b"value"
    assert store.exists(key)
    assert store.list() == [key]
    store.delete(key)
    assert not store.exists(key)


def test_big_objects_arrive_whole_in_parts(store: Storage) -> None:
    data = os.urandom(41 * MIB)  # three parts on the way up and two batches of ranges on the way down
    store.write("large.bin", memoryview(data))
    assert store.size("large.bin") == len(data)
    buffer = bytearray(len(data) + 1)
    assert store.read_into("large.bin", buffer) == len(data)
    assert memoryview(buffer)[:-1] == data
    assert store.read("large.bin") == data
    assert store.read_into("large.bin", memoryview(buffer)[: 9 * MIB], start=35 * MIB) == 6 * MIB
    assert buffer[: 6 * MIB] == data[35 * MIB :]


def test_many_threads_read_and_write_at_once(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.write(str(n), bytes([n]) * 100_000), range(8)))
        found = list(pool.map(store.read, [str(n % 8) for n in range(32)]))
    assert found == [bytes([n % 8]) * 100_000 for n in range(32)]


def test_trees_of_more_objects_than_one_request_deletes(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.write(f"tree/{n % 7}/{n}", b"x"), range(60)))
    store.write("treetop", b"x")
    assert len(store.list("tree")) == 60
    store.delete_tree("tree")
    assert store.list() == ["treetop"]


def test_a_name_is_not_taken_for_a_pattern(store: Storage) -> None:
    for key in ("tree/a", "tree/[a]", "tree/*", "treetop"):
        store.write(key, b"x")
    store.delete("tree/*")
    assert store.list() == ["tree/[a]", "tree/a", "treetop"]
    store.write("tree/b*", b"x")
    store.write("tree/c", b"x")
    store.delete_tree("tree")
    assert store.list() == ["treetop"]


def test_what_is_missing_is_named(store: Storage) -> None:
    for action in (store.read, store.size, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectNotFoundError, match=f"{store.url}/a/nothing: there is no such object"):
            action("a/nothing")


def test_a_missing_bucket_is_named(remote: Place) -> None:
    elsewhere = Place(remote.url.replace(BUCKET, "nowhere"), remote.options).open()
    with pytest.raises(StorageError, match=f"cannot write {elsewhere.url}/.*: the bucket does not exist; create it"):
        elsewhere.check_writable()
    with pytest.raises(StorageError, match="the bucket does not exist; create it"):
        elsewhere.write("large.bin", bytes(17 * MIB))
    with pytest.raises(StorageError, match=f"cannot read {elsewhere.url}/key: "):
        elsewhere.read("key")
    assert not elsewhere.exists("key")
    assert elsewhere.list() == []


def test_an_endpoint_that_nobody_serves_is_named(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = object_servers.Server(1, "a2V5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed.endpoint)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", closed.endpoint)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", object_servers.azure_connection(closed))
    with pytest.raises(StorageError, match=r"after 2 attempts: the store cannot be reached .*check the endpoint"):
        remote.open().check_writable()


@pytest.fixture
def strict_s3(_s3: object_servers.Server) -> Iterator[None]:
    """The S3 server asks for the keys of a user that exists."""
    _s3.request("POST", "/moto-api/reset-auth", "0")
    yield
    _s3.request("POST", "/moto-api/reset-auth", "inf")


def test_wrong_credentials_are_named(
    remote: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = remote.url.partition(":")[0]
    if protocol == "s3":
        request.getfixturevalue("strict_s3")
    if protocol == "gs":
        pytest.skip("this Google server takes any credentials; what a refusal becomes is in test_errors.py")
    if protocol == "abfs":
        wrong = object_servers.azure_connection(request.getfixturevalue("azure_server"), "d3Jvbmc=")
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    with pytest.raises(StorageError, match=r"access denied .*check the credentials in the environment \(A") as caught:
        remote.open().check_writable()
    assert "attempts" not in str(caught.value)


def test_inference_in_any_store_gives_the_bytes_of_local_folders(
    store: Storage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undisturbed = Undisturbed.make(tmp_path_factory.mktemp("world"))
    run = Run.copy(undisturbed, store)
    run.check(undisturbed, run.infer())


# --- what is tried again, by us and by nobody else -------------------------------------------


@pytest.fixture
def proxy(remote: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server that ``remote`` uses."""
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.01)
    protocol = remote.url.partition(":")[0]
    server = request.getfixturevalue({"s3": "_s3", "gs": "_gs", "abfs": "_azure"}[protocol])
    with fault_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        front = object_servers.Server(proxy.server_port, server.key)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", object_servers.azure_connection(front))
        yield proxy


@pytest.mark.parametrize("fault", ["503", "500", "short", "reset"])
def test_one_attempt_is_one_request(remote: Place, proxy: FaultProxy, fault: str) -> None:
    store = remote.open(retries=2)
    store.write("key", bytes(1000))
    proxy.requests.clear()
    proxy.plan = [Fault(fault, "GET", times=2)]
    assert store.read("key") == bytes(1000)
    assert proxy.requests == ["GET"] * 3
    proxy.plan = [Fault("503", times=100)]
    with pytest.raises(StorageError, match="after 3 attempts: the store cannot be reached or is overloaded"):
        store.write("key", b"x")
    assert len(proxy.requests) == 6


@pytest.mark.parametrize("fault", ["503", "twice", "lost"])
def test_a_part_of_a_big_object_is_tried_again_by_itself(remote: Place, proxy: FaultProxy, fault: str) -> None:
    store, data = remote.open(retries=3, upload_part_bytes=5 * MIB), os.urandom(MIB) * 12
    proxy.plan = [Fault(fault, key="partNumber|comp=block(&|$)|upload_id", nth=2)]
    store.write("big", data)
    assert proxy.plan[0].struck == 1
    sends = proxy.requests.count("PUT") + proxy.requests.count("POST")
    assert sends <= 3 + 2 + 1
    assert store.read("big") == data


# --- the native reader of S3 -----------------------------------------------------------------


@pytest.fixture
def native(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, "s3, obstore", tmp_path)


def test_what_goes_wrong_in_the_native_reader_is_read_by_s3fs(
    native: Place, s3_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.01)
    with fault_proxy(s3_server) as proxy:
        native.options["endpoint_url"] = proxy.endpoint
        store, data = native.open(), os.urandom(41 * MIB)
        store.write("key", data)
        proxy.requests.clear()
        buffer = bytearray(len(data))
        for fault in ("503", "short", "reset"):
            proxy.plan = [Fault(fault, "GET", nth=2)]
            assert store.read_into("key", buffer) == len(data)
            assert buffer == data
            assert proxy.plan[0].struck == 1
        assert proxy.requests.count("GET") == 3 * (6 + 1)  # six ranges each, and the one that failed
        assert caplog.text == ""  # no attempt of ours was needed
        proxy.plan = [Fault("503", "GET", times=1000)]
        with pytest.raises(StorageError, match="after 2 attempts: the store cannot be reached or is overloaded"):
            store.read("key")


def test_the_native_reader_serves_and_stands_back_after_a_fork(native: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = native.open()
    store.write("key", bytes(range(100)))
    reads: list[str] = []
    real = type(store._backend.fs)._cat_file  # type: ignore[attr-defined]

    async def cat_file(self: Any, path: str, **options: Any) -> bytes:
        reads.append(path)
        return await real(self, path, **options)

    monkeypatch.setattr(type(store._backend.fs), "_cat_file", cat_file)  # type: ignore[attr-defined]
    assert store.read("key") == bytes(range(100))
    assert store.read_range("key", 90, 200) == bytes(range(90, 100))
    assert reads == []
    child = os.fork()
    if child == 0:
        os._exit(0 if store.read("key") == bytes(range(100)) and reads else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("elsewhere", ["profile", "option", "no key"])
def test_the_native_reader_is_left_out_where_only_s3fs_knows_how_to_log_in(
    native: Place, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.open()._backend._native is not None  # type: ignore[attr-defined]
    if elsewhere == "profile":
        monkeypatch.setenv("AWS_PROFILE", "team")
    elif elsewhere == "option":
        native.options["anon"] = True
    else:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert native.open()._backend._native is None  # type: ignore[attr-defined]
