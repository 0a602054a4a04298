"""What the threads and the consumer of a stream share: the queue, and what it may hold."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from gkd_dist.errors import StudentError
from gkd_dist.graph import Batch
from gkd_dist.stream.order import Position
from gkd_dist.stream.resident import Resident

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
_SAY_S = 30.0  # a longer wait is said while it lasts


@dataclass
class StreamStats:
    """What reading cost so far."""

    wait_s: float = 0.0  # time the consumer was blocked
    num_loads: int = 0
    num_hits: int = 0  # batches that were resident or already being loaded
    loaded_bytes: int = 0  # of the batches loaded, decoded


@dataclass(frozen=True)
class Slot(Generic[Key]):
    """One place of the order: what it is, what it holds of the budget, and its batch to come."""

    position: Position
    key: Key
    size_bytes: int
    extra_bytes: int = 0  # beside it while it is loaded
    batch: Future[Batch] = field(default_factory=Future)


class Reader(Generic[Key]):
    """What threads and consumer share. Threads know only this, so an abandoned `Prefetcher` can die."""

    def __init__(
        self,
        load: Callable[[Key], Batch],
        order: Iterable[tuple[Position, Key]],
        size_of: Callable[[Key], int],
        extra_of: Callable[[Key], int],
        budget_bytes: int,
        resident_bytes: int,
    ) -> None:
        self.load = load
        self.order = iter(order)
        self.size_of, self.extra_of = size_of, extra_of
        self.budget_bytes = budget_bytes
        self.changed = threading.Condition()
        # everything below is guarded by `changed`
        self.queue: deque[Slot[Key]] = deque()
        self.ahead: Slot[Key] | None = None  # taken from the order, waiting for room
        self.queued_bytes = 0  # of batches in the queue, loaded or not
        self.extra_bytes = 0  # of what is being loaded
        self.used: dict[Key, None] = {}  # delivered since `settle`
        self.ended = False  # the order is exhausted, or an error was met
        self.closed = False
        self.loading: dict[Key, Future[Batch]] = {}
        self.resident = Resident[Key](resident_bytes)
        self.stats = StreamStats()

    def run(self) -> None:
        """Body of a thread: loads one slot after the other until there is nothing more to do."""
        while (slot := self._next_slot()) is not None:
            try:
                batch = self.load(slot.key)
            except BaseException as error:
                stop = isinstance(error, StopIteration)
                with self.changed:
                    self.ended = True
                    del self.loading[slot.key]
                    self.extra_bytes -= slot.extra_bytes
                    self.changed.notify_all()
                # a StopIteration would end the consumer's loop as if all had been read
                slot.batch.set_exception(RuntimeError("StopIteration while loading") if stop else error)
                return
            with self.changed:
                self.stats.num_loads += 1
                self.stats.loaded_bytes += slot.size_bytes
                if not self.closed:
                    self.resident.put(slot.key, batch, slot.size_bytes)
                del self.loading[slot.key]
                self.extra_bytes -= slot.extra_bytes
                self.changed.notify_all()  # there is room again
            slot.batch.set_result(batch)

    def _next_slot(self) -> Slot[Key] | None:
        """The next slot that really has to be loaded; waits for room; None at the end."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.closed or self.ended or self._has_room())
                if self.closed or self.ended:
                    return None
                if self.ahead is None:
                    self._advance()
                    continue
                slot, self.ahead = self.ahead, None
                future = self._known(slot)
                self._enqueue(slot if future is None else replace(slot, batch=future))
                if future is None:
                    self.loading[slot.key] = slot.batch
                    self.extra_bytes += slot.extra_bytes
                    return slot

    def _has_room(self) -> bool:
        """Whether the slot ahead fits; one always does, however large it is."""
        if self.ahead is None or not self.queue:
            return True
        extra = 0 if self.ahead.key in self.resident or self.ahead.key in self.loading else self.ahead.extra_bytes
        return self.queued_bytes + self.extra_bytes + self.ahead.size_bytes + extra <= self.budget_bytes

    def _advance(self) -> None:
        """Takes the next place from the order; an error of the order becomes a slot."""
        position, key = Position(), None
        try:
            position, key = next(self.order)
            self.ahead = Slot(position, key, self.size_of(key), self.extra_of(key))
        except StopIteration:
            self.ended = True
        except BaseException as error:
            self.ended = True
            failed: Slot[Any] = Slot(position, key, 0)
            failed.batch.set_exception(error)
            self.queue.append(failed)
        if self.ended:
            self.changed.notify_all()

    def _known(self, slot: Slot[Key]) -> Future[Batch] | None:
        """The batch of a slot if it is resident or on its way."""
        if slot.key in self.loading:
            self.stats.num_hits += 1
            return self.loading[slot.key]
        batch = self.resident.get(slot.key)
        if batch is None:
            return None
        self.stats.num_hits += 1
        slot.batch.set_result(batch)
        return slot.batch

    def _enqueue(self, slot: Slot[Key]) -> None:
        self.queue.append(slot)
        self.queued_bytes += slot.size_bytes
        self.changed.notify_all()

    def take(
        self, timeout_s: float | None, describe: Callable[[Slot[Key]], str], since: float | None = None
    ) -> Slot[Key] | None:
        """The next slot in order, its batch loaded or failed; None at the end or when closed.

        Raises `StudentError` where it is not loaded within ``timeout_s`` from now, or from ``since`` (monotonic).
        """
        started = time.perf_counter()
        with self.changed:
            # a slot is queued before it is loaded, so this waits for no store
            self.changed.wait_for(lambda: self.queue or self.ended or self.closed)
            slot = self.queue[0] if self.queue else None
        try:
            if slot is not None:
                await_slot(slot, timeout_s, describe, since)
        finally:
            with self.changed:
                self.stats.wait_s += time.perf_counter() - started
        with self.changed:
            if slot is None or self.closed:
                return None
            self.queue.popleft()
            self.queued_bytes -= slot.size_bytes
            self.used[slot.key] = None
            self.changed.notify_all()
        return slot

    def settle(self) -> None:
        """Weighs what was delivered since the last time: batches grow by what is derived from them."""
        with self.changed:
            for key in self.used:
                self.resident.weigh(key)
            self.used.clear()

    def stop(self) -> None:
        """Forgets what was read and makes the threads return after the load they are in."""
        with self.changed:
            self.closed = True
            self.queue.clear()
            self.resident.clear()
            self.changed.notify_all()


def await_slot(
    slot: Slot[Key], timeout_s: float | None, describe: Callable[[Slot[Key]], str], since: float | None = None
) -> None:
    """Waits until a slot is loaded or failed, and says so where that takes long."""
    now = time.monotonic()
    left_s = None if timeout_s is None else max(0.0, timeout_s + (now if since is None else since) - now)
    say_s = _SAY_S if left_s is None else min(_SAY_S, left_s)
    try:
        slot.batch.exception(say_s)
        return
    except TimeoutError:
        if left_s is None or say_s < left_s:
            log.warning("%s has taken %.0f s so far", describe(slot), say_s)
    try:
        slot.batch.exception(None if left_s is None else left_s - say_s)
    except TimeoutError as error:
        within = f"{timeout_s:g} s{'' if since is None else ' of its step'}"
        raise StudentError(
            f"{describe(slot)} was not read within {within}; check that the store answers, then run the same "
            "command again, or raise data_timeout_s"
        ) from error
