"""Storage over files and memory: keys, atomic writes, errors, copies. S3 is in tests/flow/test_s3.py."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry as fsspec_registry

from gkd_dist.config import StorageConfig
from gkd_dist.errors import ConfigError, JsonError, ObjectNotFoundError, StorageError
from gkd_dist.storage import Storage, parse_url
from gkd_dist.storage import errors as storage_errors


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "run") if request.param == "file" else f"memory://{uuid.uuid4().hex}/run")


# --- the same for every protocol -------------------------------------------------------------


def test_what_is_written_is_read(store: Storage) -> None:
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.size("a/b.bin") == 10
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert not store.exists("a/b")


@pytest.mark.parametrize(("start", "stop", "expected"), [(2, 5, b"234"), (0, 10, b"0123456789"), (8, 99, b"89"),
                                                         (10, 12, b""), (50, 60, b""), (3, 3, b"")])  # fmt: skip
def test_ranges_are_slices(store: Storage, start: int, stop: int, expected: bytes) -> None:
    store.write("key", b"0123456789")
    assert store.read_range("key", start, stop) == expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_ranges_from_the_end_are_refused(store: Storage, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        store.read_range("key", start, stop)


def test_read_into_fills_a_buffer_and_says_how_far(store: Storage) -> None:
    store.write("key", b"0123456789")
    buffer = bytearray(12)
    assert store.read_into("key", buffer) == 10
    assert buffer == b"0123456789\0\0"
    assert store.read_into("key", memoryview(buffer)[:4], start=5) == 4
    assert buffer == b"5678456789\0\0"
    assert store.read_into("key", buffer, start=10) == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_written(store: Storage, kind: type) -> None:
    store.write("key", kind(b"value"))
    store.write("empty", kind(b""))
    assert (store.read("key"), store.read("empty")) == (b"value", b"")


def test_pieces_are_written_as_one_object(store: Storage) -> None:
    store.write("key", [b"01", memoryview(b"234"), b"", b"5"])
    assert store.read("key") == b"012345"
    with pytest.raises(ValueError, match="an object needs a key"):
        store.write("", [b"0"])


def test_a_missing_object_is_named_with_its_url(store: Storage) -> None:
    for action in (store.read, store.size, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectNotFoundError, match=f"{store.url}/a/nothing: there is no such object"):
            action("a/nothing")


def test_deleting_is_repeatable_and_keeps_neighbours(store: Storage) -> None:
    for key in ("a/1", "a/b/2", "ab/3"):
        store.write(key, b"x")
    store.delete("a/1")
    store.delete("a/1")
    assert store.list() == ["a/b/2", "ab/3"]
    store.delete_tree("a")
    store.delete_tree("a")
    assert store.list() == ["ab/3"]


def test_a_child_sees_its_part(store: Storage) -> None:
    child = store.child("graph").child("sub/")
    child.write("key", b"x")
    assert child.url == f"{store.url}/graph/sub"
    assert child.list() == ["key"]
    assert store.list("graph") == ["graph/sub/key"]
    assert store.list("grap") == []


def test_json_round_trip_is_sorted_utf8(store: Storage) -> None:
    store.write_json("value.json", {"b": [1, None], "a": "Straße"})
    assert store.read("value.json").decode() == '{\n "a": "Straße",\n "b": [\n  1,\n  null\n ]\n}\n'
    assert store.read_json("value.json") == {"a": "Straße", "b": [1, None]}
    store.write("value.json", b'{"a": ')
    with pytest.raises(JsonError, match=r"value\.json is not JSON .*run the stage"):
        store.read_json("value.json")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a\\b", "a\0b"])
def test_keys_stay_below_the_root(store: Storage, key: str) -> None:
    for action in (store.read, store.delete, store.child, lambda key: store.write(key, b"")):
        with pytest.raises(StorageError, match="is no key of"):
            action(key)


def test_a_copy_opens_its_own_connection(store: Storage) -> None:
    store.write("key", b"value")
    copy = pickle.loads(pickle.dumps(store.child("x")))
    assert copy.url == f"{store.url}/x"
    assert copy.config == store.config
    assert pickle.loads(pickle.dumps(store)).read("key") == b"value"


def test_threads_read_without_mixing_their_bytes(store: Storage) -> None:
    for number in range(4):
        store.write(str(number), bytes([number]) * 100_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: set(store.read(str(n % 4))), range(64)))
    assert found == [{n % 4} for n in range(64)]


def test_check_writable_leaves_nothing(store: Storage) -> None:
    store.check_writable()
    assert store.list() == []


# --- URLs ------------------------------------------------------------------------------------


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_url("runs/a") == ("file", f"{tmp_path}/runs/a")
    assert parse_url("file:///a/b/") == ("file", "/a/b")
    assert parse_url("file:///a%20b") == ("file", "/a b")
    assert parse_url("s3://bucket/p/q/") == ("s3", "bucket/p/q")
    assert parse_url("memory://") == ("memory", "")
    assert Storage.open("runs/a").local_path("x/y") == tmp_path / "runs/a/x/y"
    assert Storage.open("memory://x").local_path() is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "names no store"),
        ("file://a/b", "no absolute path"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a//b", "empty or dotted"),
        ("s3://bucket/a*", "patterns"),
        ("simplecache::s3://bucket", "names no store"),
    ],
)
def test_urls_that_name_no_store(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Storage.open(url)


def test_unknown_protocols_and_missing_packages_are_config_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot open nosuch:// URLs"):
        Storage.open("nosuch://a/b").read("key")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(fsspec_registry, "s3", raising=False)  # loaded by another test
    with pytest.raises(ConfigError, match=r"pip install 'gkd_dist\[s3\]'"):
        Storage.open("s3://bucket/path").read("key")


def test_credentials_have_no_place_in_the_config() -> None:
    config = StorageConfig(options={"s3": {"key": "x", "secret": "y", "endpoint_url": "http://store"}})
    with pytest.raises(ConfigError, match=r"storage\.options\.s3 holds credentials \(key, secret\).*environment"):
        Storage.open("s3://bucket/path", config)


def test_any_other_file_system_of_fsspec_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Folders(LocalFileSystem):
        protocol = "folders"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(LocalFileSystem._strip_protocol(f"{tmp_path}/{path}" if not path.startswith("/") else path))

    fsspec.register_implementation("folders", Folders, clobber=True)
    store = Storage.open("folders://root")
    store.check_writable()
    assert caplog.text.count("a reader may see an object while it is written") == 1
    store.write("a/b", b"0123")
    assert store.read_range("a/b", 1, 9) == b"123"
    assert store.list() == ["a/b"]
    store.delete_tree("a")
    assert store.list() == []


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path), StorageConfig(retries=0))


def test_files_follow_the_umask_and_leave_no_temporaries(folder: Storage, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder.write("key", b"value")
    finally:
        os.umask(old)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full; free space"),
        (errno.EACCES, "permission denied; change the permissions"),
        (errno.EROFS, "the file system is read-only; use a folder"),
    ],
)
def test_a_failed_write_keeps_the_old_object(
    folder: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    folder.write("key", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=f"cannot write {folder.url}/key: {message}"):
        folder.write("key", b"new")
    monkeypatch.undo()
    assert folder.read("key") == b"old"
    assert os.listdir(tmp_path) == ["key"]


def test_a_folder_of_somebody_else(folder: Storage, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # permissions do not bind the superuser
        os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match="permission denied; change the permissions"):
            folder.check_writable()
    finally:
        os.seteuid(user)


def test_a_file_where_a_folder_is_needed(folder: Storage) -> None:
    folder.write("a", b"x")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        folder.write("a/b", b"x")
    assert not folder.exists("a/b")


def test_a_writer_killed_before_the_rename_changes_nothing(folder: Storage, tmp_path: Path) -> None:
    folder.write("key", b"old")
    program = (
        "import os, signal, sys\n"
        "from gkd_dist.storage import Storage\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Storage.open(sys.argv[1]).write('key', b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60).returncode == -signal.SIGKILL
    assert folder.read("key") == b"old"
    assert folder.list() == ["key"]
    assert folder.list(leftovers=True) == []  # too young: it may belong to a writer that is alive
    (temporary,) = set(os.listdir(tmp_path)) - {"key"}
    two_hours_ago = time.time() - 7200
    os.utime(tmp_path / temporary, (two_hours_ago, two_hours_ago))
    assert folder.list(leftovers=True) == [temporary]
    folder.delete(temporary)
    assert os.listdir(tmp_path) == ["key"]


def test_readers_see_old_or_new_bytes_and_never_a_mixture(folder: Storage) -> None:
    size = 200_000
    folder.write("key", b"a" * size)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(lambda: [folder.write("key", letter * size) for letter in (b"b", b"a") * 10])
        while not writing.done():
            data = folder.read("key")
            assert len(data) == size
            assert len(set(data)) == 1


def test_transient_errors_of_a_network_folder_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_S", 0.001)
    store = Storage.open(str(tmp_path), StorageConfig(retries=2))
    store.write("key", b"value")
    failures, real = [errno.ESTALE, errno.ETIMEDOUT], os.preadv

    def preadv(*args: object) -> int:
        if failures:
            raise OSError(failures.pop(), "network folder")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    assert store.read("key") == b"value"
    assert failures == []
