"""Signs of life between ranks: who has died or hangs is known in seconds, and who is slow is waited for.

A collective cannot tell a peer that is late from one that was stopped or whose machine is gone. So a
thread of every rank says every second that its process runs, and where it is, in the store through
which the ranks have found each other; each rank watches the next one. A rank that computes, reads or
sleeps goes on saying so and is waited for, up to the bound of the collective itself. One that is
silent for ``timeout_s`` is given up by its watcher, which ends its own process: a wait inside gloo
cannot be ended otherwise. The others lose their connection to it, and the launcher ends or restarts
them all.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

from gkd_dist.errors import StudentError, TerminatedError
from gkd_dist.world import World

_BEAT_S = 1.0
_MOST_FAILURES = 60  # of the store, one after the other, until it counts as gone
_LOOK_S = 3.0  # patience with the store for a better message
_Store = Any


@dataclass
class Pulse:
    """When a watched rank has last been heard. Pure: times are arguments, in seconds of any clock."""

    timeout_s: float
    heard_at: float
    looked_at: float = field(default=0.0)
    last: bytes = b""

    def hear(self, sign: bytes, now: float) -> None:
        """What the store says of the rank; only what differs from before is a sign of life."""
        if sign != self.last:
            self.last, self.heard_at = sign, now

    def silent_s(self, now: float) -> float | None:
        """For how long it has been silent, where that is too long; None: no reason to worry.

        A watcher that was itself stopped for a while knows nothing and begins anew.
        """
        away = now - self.looked_at if self.looked_at else 0.0
        self.looked_at = now
        if away > 5 * _BEAT_S:
            self.heard_at = now
        silent = now - self.heard_at
        return silent if silent > self.timeout_s and not _has_ended(self.last) else None


class Beacon:
    """Says that this rank lives and watches the next one, for the time of a ``with`` block.

    ``give_up`` gets the sentence when the next rank is silent; it must not return. A world of one has
    nobody to watch.
    """

    def __init__(self, world: World, timeout_s: float, give_up: Callable[[str], None] | None = None) -> None:
        self._world, self._give_up = world, give_up or end_process
        self._next = (world.rank + 1) % world.world_size
        self._pulse = Pulse(timeout_s, time.monotonic())
        self._ended = threading.Event()
        self._count = 0
        self._host = f"process {os.getpid()} on {socket.gethostname()}"

    def __enter__(self) -> Beacon:
        if self._world.world_size > 1:
            self._store = self._world.mailbox()
            self._say(self._store)
            self._world.barrier()  # now everybody has said something
            self._pulse.heard_at = time.monotonic()
            self._world.place.others = self.where_they_are
            for work in (self._beat, self._judge):
                threading.Thread(target=work, name=f"gkd-beacon{work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._world.place.others = lambda: ""
        together = kind is None or issubclass(kind, TerminatedError)  # all ranks have agreed to end here
        if together and self._world.world_size > 1:
            with suppress(Exception):  # of a store that has ended before
                self._say(self._store)  # a farewell; one that fails is watched until its process is gone

    def _say(self, store: _Store) -> None:
        self._count += 1
        sign = {"count": self._count, "who": self._host, "place": str(self._world.place), "ended": self._ended.is_set()}
        store.set(_key(self._world.rank), json.dumps(sign))

    def _beat(self) -> None:
        """Says and hears. May hang in a store whose process is stopped: the judge has a thread of its own."""
        failures = 0
        while failures < _MOST_FAILURES and not self._ended.wait(_BEAT_S):
            try:
                self._say(self._store)
                self._pulse.hear(self._store.get(_key(self._next)), time.monotonic())
                failures = 0
            except Exception:  # once: of a busy machine; always: of a store that is gone, which is the judge's matter
                failures += 1

    def _judge(self) -> None:
        while not self._ended.wait(_BEAT_S):
            silent_s = self._pulse.silent_s(time.monotonic())
            if silent_s is not None:
                self._give_up(self._sentence(silent_s))
                return

    def _sentence(self, silent_s: float) -> str:
        where = str(self._world.place)
        return (
            f"rank {self._world.rank} of {self._world.world_size}{f' ({where})' if where else ''} gives up rank "
            f"{self._next}, which has been silent for {silent_s:.0f} s: {_last_sign(self._pulse.last)}; it was killed "
            "or stopped, or its machine is gone: look there, then run the same command again"
        )

    def where_they_are(self) -> str:
        """Where each other rank was last seen; empty where the store does not answer."""
        found: list[str] = []

        def look() -> None:
            with suppress(Exception):
                store = self._world.mailbox()
                store.set_timeout(timedelta(seconds=_LOOK_S))
                for rank in range(self._world.world_size):
                    if rank != self._world.rank:
                        found.append(f"rank {rank}: {_last_sign(store.get(_key(rank)))}")

        thread = threading.Thread(target=look, name="gkd-look", daemon=True)
        thread.start()
        thread.join(_LOOK_S)
        return ", ".join(found[:8]) + (" and more" if len(found) > 8 else "")


def _key(rank: int) -> str:
    return f"gkd/beacon/{rank}"


def _has_ended(sign: bytes) -> bool:
    """Whether it was a farewell: that rank has done its work."""
    return b'"ended": true' in sign


def _last_sign(sign: bytes) -> str:
    try:
        value = json.loads(sign)
        return f"last seen {value.get('place') or 'starting'} ({value['who']})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "never seen"


def end_process(sentence: str) -> None:
    """Says it as the command says its errors, and ends this process with the exit code of infrastructure."""
    print(f"gkd: error: {sentence}", file=sys.stderr, flush=True)
    os._exit(StudentError.exit_code)
