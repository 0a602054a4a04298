"""Two drivers of one run: who stays, who stops, and when a third may take over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from gkd_dist import owner as owner_module
from gkd_dist.errors import OwnershipError
from gkd_dist.owner import Owner, Ownership
from gkd_dist.storage import Storage

NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def _short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "SETTLE_S", 0.01)


@pytest.fixture
def store() -> Storage:
    return Storage.open(f"memory://{uuid.uuid4().hex}")


def record(store: Storage, **changes: Any) -> None:
    """Another driver's ``owner.json``."""
    now = time.time()
    other = {"host": "elsewhere", "pid": 1, "token": "theirs", "started_at": now, "heartbeat_at": now}
    store.write_json("owner.json", other | changes)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_run_is_held_and_given_back(store: Storage) -> None:
    with Ownership(store) as mine:
        mine.check()
        found = store.read_json("owner.json")
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        assert found["started_at"] == found["heartbeat_at"] == pytest.approx(time.time(), abs=5)
    assert not store.exists("owner.json")


def test_a_second_driver_stops_with_exit_status_4(store: Storage) -> None:
    with Ownership(store) as first:
        with pytest.raises(OwnershipError, match=rf"driven by process {os.getpid()} on .*--take-over") as caught:
            Ownership(store).acquire()
        assert caught.value.exit_code == 4
        first.check()
    with Ownership(store) as next_one:
        next_one.check()


@pytest.mark.parametrize(
    ("heartbeat_age_s", "host", "pid", "gone"),
    [
        (119.0, "elsewhere", 1, False),
        (120.0, "elsewhere", 1, True),
        (-500.0, "elsewhere", 1, False),  # a clock that is ahead
        (0.0, "here", os.getpid(), False),
        (120.0, "here", os.getpid(), True),
    ],
)
def test_when_a_driver_counts_as_gone(heartbeat_age_s: float, host: str, pid: int, gone: bool) -> None:
    assert Owner(host, pid, "t", 0.0, NOW - heartbeat_age_s).is_gone(NOW, "here") is gone


def test_a_dead_process_on_this_host_is_gone_at_once(store: Storage, caplog: pytest.LogCaptureFixture) -> None:
    record(store, host=socket.gethostname(), pid=dead_pid())
    with Ownership(store) as mine:
        mine.check()
    assert "which has ended" in caplog.text


def test_the_same_process_number_on_another_host_says_nothing(store: Storage) -> None:
    record(store, pid=dead_pid())
    with pytest.raises(OwnershipError, match="on elsewhere, last sign of life 0 s ago"):
        Ownership(store).acquire()


def test_taking_over_ends_the_first_driver_at_its_next_commit(store: Storage) -> None:
    with Ownership(store) as first, Ownership(store, take_over=True) as second:
        second.check()
        with pytest.raises(OwnershipError, match=r"no longer owns memory://.*nothing more is written here"):
            first.check()
        first.release()
        second.check()  # what is not one's own is not deleted


def test_of_two_that_start_together_the_last_writer_stays(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_one_writes(seconds: float) -> None:
        monkeypatch.undo()
        record(store)

    monkeypatch.setattr(owner_module.time, "sleep", another_one_writes)
    with pytest.raises(OwnershipError, match="process 1 on elsewhere does"):
        Ownership(store).acquire()
    assert store.read_json("owner.json")["token"] == "theirs"


def test_a_deleted_record_is_a_lost_run(store: Storage) -> None:
    with Ownership(store) as mine:
        store.delete("owner.json")
        with pytest.raises(OwnershipError, match="nobody does"):
            mine.check()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"host": "a"}', b'{"host": 1, "pid": "x"}'])
def test_an_unreadable_record_needs_a_decision(store: Storage, data: bytes) -> None:
    store.write("owner.json", data)
    with pytest.raises(OwnershipError, match=r"cannot be read as the owner .*--take-over"):
        Ownership(store).acquire()
    with Ownership(store, take_over=True) as mine:
        mine.check()


def until(condition: Any, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_the_heartbeat_is_renewed_until_the_end(store: Storage) -> None:
    with Ownership(store, heartbeat_s=0.02):
        first = store.read_json("owner.json")
        assert until(lambda: store.read_json("owner.json")["heartbeat_at"] > first["heartbeat_at"])
        assert store.read_json("owner.json")["started_at"] == first["started_at"]
    assert not [thread for thread in threading.enumerate() if thread.name == "gkd-owner"]
    time.sleep(0.05)
    assert not store.exists("owner.json")


def test_the_heartbeat_never_takes_the_run_back(store: Storage) -> None:
    with Ownership(store, heartbeat_s=0.02):
        record(store)
        assert until(lambda: not [t for t in threading.enumerate() if t.name == "gkd-owner"])
        assert store.read_json("owner.json")["token"] == "theirs"
    assert store.exists("owner.json")


def test_a_store_that_fails_for_a_while_does_not_end_the_heartbeat(
    store: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gkd_dist.errors import StorageError

    def fail(self: Storage, key: str, value: object) -> None:
        raise StorageError("unreachable")

    with Ownership(store, heartbeat_s=0.02):
        first = store.read_json("owner.json")
        monkeypatch.setattr(Storage, "write_json", fail)
        assert until(lambda: "cannot renew the ownership" in caplog.text)
        monkeypatch.undo()
        assert until(lambda: store.read_json("owner.json")["heartbeat_at"] > first["heartbeat_at"])


def test_a_killed_driver_can_be_replaced_on_the_same_host(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from gkd_dist.owner import Ownership\n"
        "from gkd_dist.storage import Storage\n"
        "Ownership(Storage.open(sys.argv[1])).acquire()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    store = Storage.open(str(tmp_path))
    with pytest.raises(OwnershipError, match=f"driven by process {process.pid}"):
        Ownership(store).acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Ownership(store) as mine:
        mine.check()
