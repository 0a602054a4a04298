"""Reads ahead: threads load batches within a byte budget, the consumer gets them in order.

::

    order: (position, key) ...  -->  slots in order, loaded by threads  -->  (position, batch) ...
                                         ^  resident batches (LRU)

Every slot carries its position, so what a checkpoint saves is the place of what was delivered, not
of what had been read. An error of the loader, or of the order itself, is a slot too: it surfaces in
the consumer at its place, after everything before it.

Threads and no processes: reading and decoding release the interpreter lock, and a fork under CUDA,
Ray or gloo is not safe. Batches are shared with the resident ones: treat them as read-only.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.sparse import CsrPattern
from gkd_dist.stream.order import Position
from gkd_dist.stream.resident import Resident

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
_JOIN_S = 60.0  # close() waits this long for a load under way; storage requests have shorter limits


@dataclass
class StreamStats:
    """What reading cost so far."""

    wait_s: float = 0.0  # time the consumer was blocked
    num_loads: int = 0
    num_hits: int = 0  # batches that were resident or already being loaded
    loaded_bytes: int = 0  # of the batches loaded, decoded


@dataclass(frozen=True)
class _Slot(Generic[Key]):
    """One place of the order: what it is, what it holds of the budget, and its batch to come."""

    position: Position
    key: Key
    size_bytes: int
    batch: Future[Batch] = field(default_factory=Future)


class _Reader(Generic[Key]):
    """What threads and consumer share. Threads know only this, so an abandoned `Prefetcher` can die."""

    def __init__(
        self,
        load: Callable[[Key], Batch],
        order: Iterable[tuple[Position, Key]],
        size_of: Callable[[Key], int],
        budget_bytes: int,
        resident_bytes: int,
    ) -> None:
        self.load = load
        self.order = iter(order)
        self.size_of = size_of
        self.budget_bytes = budget_bytes
        self.changed = threading.Condition()
        # everything below is guarded by `changed`
        self.queue: deque[_Slot[Key]] = deque()
        self.ahead: _Slot[Key] | None = None  # taken from the order, waiting for room
        self.queued_bytes = 0
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
            slot.batch.set_result(batch)

    def _next_slot(self) -> _Slot[Key] | None:
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
                    return slot

    def _has_room(self) -> bool:
        """Whether the slot ahead fits; one always does, however large it is."""
        if self.ahead is None or not self.queue:
            return True
        return self.queued_bytes + self.ahead.size_bytes <= self.budget_bytes

    def _advance(self) -> None:
        """Takes the next place from the order; an error of the order becomes a slot."""
        position, key = Position(), None
        try:
            position, key = next(self.order)
            self.ahead = _Slot(position, key, self.size_of(key))
        except StopIteration:
            self.ended = True
        except BaseException as error:
            self.ended = True
            failed: _Slot[Any] = _Slot(position, key, 0)
            failed.batch.set_exception(error)
            self.queue.append(failed)
        if self.ended:
            self.changed.notify_all()

    def _known(self, slot: _Slot[Key]) -> Future[Batch] | None:
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

    def _enqueue(self, slot: _Slot[Key]) -> None:
        self.queue.append(slot)
        self.queued_bytes += slot.size_bytes
        self.changed.notify_all()

    def take(self) -> _Slot[Key] | None:
        """The next slot in order, its batch loaded or failed; None at the end or when closed."""
        started = time.perf_counter()
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.ended or self.closed)
            slot = self.queue[0] if self.queue else None
        if slot is not None:
            slot.batch.exception()  # waits
        with self.changed:
            self.stats.wait_s += time.perf_counter() - started
            if slot is None or self.closed:
                return None
            self.queue.popleft()
            self.queued_bytes -= slot.size_bytes
            self.changed.notify_all()
        return slot

    def stop(self) -> None:
        """Forgets what was read and makes the threads return after the load they are in."""
        with self.changed:
            self.closed = True
            self.queue.clear()
            self.resident.clear()
            self.changed.notify_all()


class Prefetcher(Generic[Key]):
    """Iterates over (position, batch) in exactly the given order, loading ahead in threads.

    ``load(key)`` makes a batch, ``order`` gives (position, key), ``size_of(key)`` its bytes before it
    is loaded. Batches that wait for the consumer stay within ``budget_bytes`` (one always may wait);
    loaded ones are kept up to ``resident_bytes``, least recently used ones going first, so that a
    small graph is decoded once. With a CUDA ``device`` batches come from pinned memory and are copied
    without blocking. Use as a context manager, or call `close`.

    Errors of ``load`` and ``order`` are raised by ``next`` at their place; the stream is then closed.
    """

    def __init__(
        self,
        load: Callable[[Key], Batch],
        order: Iterable[tuple[Position, Key]],
        budget_bytes: int,
        resident_bytes: int,
        size_of: Callable[[Key], int],
        *,
        device: torch.device | str = "cpu",
        num_threads: int = 2,
    ) -> None:
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        make = (lambda key: pinned(load(key))) if on_cuda else load
        self._reader = _Reader(make, order, size_of, budget_bytes, resident_bytes)
        # daemons: a load that hangs must not keep a dying interpreter alive
        self._threads = [
            threading.Thread(target=self._reader.run, name=f"gkd-prefetch-{index}", daemon=True)
            for index in range(num_threads)
        ]
        self._finalizer = weakref.finalize(self, self._reader.stop)
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> StreamStats:
        """Waiting time, loads and hits so far."""
        return self._reader.stats

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer was blocked so far."""
        return self._reader.stats.wait_s

    def __iter__(self) -> Iterator[tuple[Position, Batch]]:
        return self

    def __next__(self) -> tuple[Position, Batch]:
        slot = None if self._reader.closed else self._reader.take()
        if slot is None and self._reader.closed:
            raise RuntimeError("the stream is closed; open a new Prefetcher at the position to go on from")
        if slot is None:
            raise StopIteration
        if slot.batch.exception() is not None:
            self.close()
        batch = slot.batch.result()
        return slot.position, batch.to(self.device, non_blocking=True) if self.device.type != "cpu" else batch

    def close(self) -> None:
        """Stops the threads and forgets what was read; safe to call again."""
        self._reader.stop()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            log.warning("still loading %s after %.0f s; leaving it behind", list(self._reader.loading), _JOIN_S)

    def __enter__(self) -> Prefetcher[Key]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def pinned(batch: Batch) -> Batch:
    """The same batch in page-locked memory, from which a copy to the device need not block."""
    logits = batch.teacher_logits
    return replace(
        batch,
        graph=_pinned_graph(batch.graph),
        x=batch.x.pin_memory(),
        y=batch.y.pin_memory(),
        train_mask=batch.train_mask.pin_memory(),
        val_mask=batch.val_mask.pin_memory(),
        test_mask=batch.test_mask.pin_memory(),
        n_id=batch.n_id.pin_memory(),
        teacher_logits=None if logits is None else logits.pin_memory(),
        teacher_scores={key: scores.pin_memory() for key, scores in batch.teacher_scores.items()},
        logits_of={name: values.pin_memory() for name, values in batch.logits_of.items()},
    )


def _pinned_graph(graph: LocalGraph) -> LocalGraph:
    pattern, weight, attr = graph.pattern, graph.edge_weight, graph.edge_attr
    structure = (pattern.indptr, pattern.indices, pattern.t_indptr, pattern.t_indices, pattern.t_perm)
    return LocalGraph(
        CsrPattern(*(tensor.pin_memory() for tensor in structure)),
        graph.in_degree.pin_memory(),
        graph.has_self_loop.pin_memory(),
        None if weight is None else weight.pin_memory(),
        graph.num_owned,
        None if attr is None else attr.pin_memory(),
        None if graph.n_id is None else graph.n_id.pin_memory(),
    )
