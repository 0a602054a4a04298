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
from collections.abc import Callable, Iterable, Iterator
from typing import Generic

import torch

from gkd_dist.errors import StudentError
from gkd_dist.graph import Batch
from gkd_dist.stream.ahead import Key, Reader, Slot, StreamStats
from gkd_dist.stream.order import Position
from gkd_dist.stream.pinned import pinned

log = logging.getLogger(__name__)
_JOIN_S = 60.0  # close() waits this long for a load under way; storage requests have shorter limits
_JOIN_AFTER_ERROR_S = 1.0  # an error has to be told soon: peers wait for this rank, and a load may hang


class Prefetcher(Generic[Key]):
    """Iterates over (position, batch) in exactly the given order, loading ahead in threads.

    ``load(key)`` makes a batch, ``order`` gives (position, key), ``size_of(key)`` its bytes before it
    is loaded and ``extra_of(key)`` what loading it takes beside it for a while. Batches that wait for the
    consumer, and what is being loaded, stay within ``budget_bytes`` (one always may wait);
    loaded ones are kept up to ``resident_bytes``, least recently used ones going first, so that a
    small graph is decoded once. With a CUDA ``device`` batches come from pinned memory and are copied
    without blocking. Use as a context manager, or call `close`.

    Errors of ``load`` and ``order`` are raised by ``next`` at their place; the stream is then closed.
    So is `StudentError` where a batch, or what `take` asks for, does not come within ``timeout_s``; ``who`` waits
    and ``name_of(key)`` say so.
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
        extra_of: Callable[[Key], int] = lambda key: 0,
        timeout_s: float | None = None,
        who: str = "the consumer",
        name_of: Callable[[Key], str] = str,
    ) -> None:
        self.device = torch.device(device)
        self._timeout_s, self._who, self._name_of = timeout_s, who, name_of
        self._join_s = _JOIN_S
        on_cuda = self.device.type == "cuda"
        make = (lambda key: pinned(load(key))) if on_cuda else load
        self._reader = Reader(make, order, size_of, extra_of, budget_bytes, resident_bytes)
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
        return self._deliver(None)

    def take(self, count: int) -> list[Batch]:
        """The next ``count`` batches, which share one time-out: peers wait for all of them together."""
        since = time.monotonic()
        return [self._deliver(since)[1] for _ in range(count)]

    def _deliver(self, since: float | None) -> tuple[Position, Batch]:
        slot = None if self._reader.closed else self._take(since)
        if slot is None and self._reader.closed:
            raise RuntimeError("the stream is closed; open a new Prefetcher at the position to go on from")
        if slot is None:
            raise StopIteration
        if slot.batch.exception() is not None:
            self.close()
        batch = slot.batch.result()
        return slot.position, batch.to(self.device, non_blocking=True) if self.device.type != "cpu" else batch

    def _take(self, since: float | None) -> Slot[Key] | None:
        try:
            return self._reader.take(self._timeout_s, self._describe, since)
        except StudentError:
            self._join_s = 0.0
            self.close()
            raise

    def _describe(self, slot: Slot[Key]) -> str:
        return f"{self._who}: {self._name_of(slot.key)} of epoch {slot.position.epoch}, step {slot.position.step}"

    def settle(self) -> None:
        """To be called when the batches delivered so far were used: what was derived from them is counted."""
        self._reader.settle()

    def close(self) -> None:
        """Stops the threads and forgets what was read; safe to call again."""
        self._reader.stop()
        deadline = time.monotonic() + self._join_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._join_s and any(thread.is_alive() for thread in self._threads):
            log.warning("still loading %s after %.0f s; leaving it behind", list(self._reader.loading), self._join_s)

    def __enter__(self) -> Prefetcher[Key]:
        return self

    def __exit__(self, *exc: object) -> None:
        if any(exc):
            self._join_s = min(self._join_s, _JOIN_AFTER_ERROR_S)
        self.close()
