"""How many tasks of a worker hold their tensors at a time: all that are in flight, until memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Room:
    """A bounded number of places; `shrink` leaves a single one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for the time of a ``with`` block; waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone or self._inside == 0)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def shrink(self) -> None:
        """From now on one task at a time; those inside may finish."""
        with self._changed:
            self._alone = True

    @property
    def is_single(self) -> bool:
        """Whether there is one place alone."""
        return self._alone


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on the processor or on a device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
