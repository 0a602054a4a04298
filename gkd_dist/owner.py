"""Keeps two drivers of one run apart, with one small object: ``owner.json``.

::

    {"host": str, "pid": int, "token": str, "started_at": float, "heartbeat_at": float}

Object stores offer neither a common exclusive create nor a rename. A driver therefore writes its
token, waits a moment and reads it back: of two that start together the last writer stays. Whoever
holds the run renews ``heartbeat_at`` (seconds since 1970, the holder's clock) in the background
and looks for its token again before each commit. A token that is not its own ends it.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType

from gkd_dist import layout
from gkd_dist.errors import InfrastructureError, JsonError, ObjectNotFoundError, OwnershipError
from gkd_dist.storage import Storage

_log = logging.getLogger(__name__)

HEARTBEAT_S = 20.0
STALE_S = 120.0
SETTLE_S = 0.2  # longer than a write is in flight, so that a driver that started together is seen


@dataclass(frozen=True)
class Owner:
    """Content of ``owner.json``. Times are in seconds since 1970."""

    host: str
    pid: int
    token: str
    started_at: float
    heartbeat_at: float

    def is_gone(self, now: float, host: str) -> bool:
        """Whether that driver is known to have ended: no heartbeat for 120 s, or no such process here."""
        return now - self.heartbeat_at >= STALE_S or (self.host == host and not _is_alive(self.pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Ownership:
    """Holds a run while it is open: ``with Ownership(storage) as owner: ...``.

    OwnershipError on entry where another driver holds the run and is not known to have ended;
    ``take_over`` takes it nevertheless. ``heartbeat_s`` is the pause between renewals.
    """

    def __init__(self, storage: Storage, take_over: bool = False, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._storage = storage
        self._take_over = take_over
        self._heartbeat_s = heartbeat_s
        self._mine = Owner(socket.gethostname(), os.getpid(), secrets.token_hex(16), 0.0, 0.0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Ownership:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def token(self) -> str:
        """What stands in ``owner.json`` as long as this driver holds the run."""
        return self._mine.token

    def acquire(self) -> None:
        """Takes the run and starts the heartbeat; see the class for errors."""
        now = time.time()
        if not self._take_over:
            self._refuse_if_held(now)
        self._mine = replace(self._mine, started_at=now, heartbeat_at=now)
        self._write()
        time.sleep(SETTLE_S)
        self.check()
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="gkd-owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """OwnershipError unless this driver still holds the run; call it before each commit."""
        found = self._read()
        if found is None or found.token != self._mine.token:
            raise OwnershipError(
                f"this driver ({self._mine}) no longer owns {self._storage.url}: "
                f"{found if found else 'nobody'} does; nothing more is written here, let the other driver finish"
            )

    def release(self) -> None:
        """Gives the run back: stops the heartbeat and deletes ``owner.json`` if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            found = self._read()
            if found is not None and found.token == self._mine.token:
                self._storage.delete(layout.OWNER)
        except InfrastructureError as error:
            # the run is finished and its result stays valid; the file is stale in two minutes
            _log.warning("cannot give back %s: %s", self._storage.url, error)

    def _refuse_if_held(self, now: float) -> None:
        other = self._read()
        if other is None:
            return
        if other.is_gone(now, self._mine.host):
            _log.warning("taking over %s from %s, which has ended", self._storage.url, other)
            return
        raise OwnershipError(
            f"{self._storage.url} is driven by {other}, last sign of life {now - other.heartbeat_at:.0f} s ago; "
            f"wait until it ends, or pass --take-over if it is gone (automatic after {STALE_S:.0f} s without a sign)"
        )

    def _beat(self) -> None:
        """Renews the heartbeat until released; ends when another driver took the run."""
        while not self._stop.wait(self._heartbeat_s):
            try:
                self.check()
                self._mine = replace(self._mine, heartbeat_at=time.time())
                if not self._stop.is_set():
                    self._write()
            except OwnershipError as error:
                _log.error("%s", error)
                return
            except InfrastructureError as error:
                _log.warning("cannot renew the ownership of %s: %s", self._storage.url, error)

    def _write(self) -> None:
        self._storage.write_json(layout.OWNER, asdict(self._mine))

    def _read(self) -> Owner | None:
        """Who holds the run, or None."""
        try:
            value = self._storage.read_json(layout.OWNER)
        except ObjectNotFoundError:
            return None
        except JsonError:
            value = None
        owner = _parse(value)
        if owner is None:
            raise OwnershipError(
                f"{self._storage.describe(layout.OWNER)} cannot be read as the owner of the run; "
                "pass --take-over if no other driver is running"
            )
        return owner


def check_owner(storage: Storage, token: str) -> None:
    """`OwnershipError` unless the driver with this token holds the run; for its workers, one small read."""
    try:
        found = storage.read_json(layout.OWNER)
    except (ObjectNotFoundError, JsonError):
        found = None
    owner = _parse(found)
    if owner is None or owner.token != token:
        raise OwnershipError(
            f"the driver of this worker no longer owns {storage.url}: {owner or 'nobody'} does; nothing more is "
            "written here, let the other driver finish"
        )


def _parse(value: object) -> Owner | None:
    types = {"host": str, "pid": int, "token": str, "started_at": (int, float), "heartbeat_at": (int, float)}
    names = [field.name for field in fields(Owner)]
    if not isinstance(value, dict) or not all(isinstance(value.get(name), types[name]) for name in names):  # type: ignore[arg-type]
        return None
    return Owner(**{name: value[name] for name in names})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
