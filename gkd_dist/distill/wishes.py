"""What one rank wants all of them to do after a step: to keep a checkpoint, to stop, to give up.

Wishes travel with the counts of the loss terms, in the one all-reduce that every step begins with. So
all ranks learn of them in the same step, whoever was asked (one process that got SIGTERM, or rank 0,
which reads the driver's request), and no step has a collective more.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_WISHES = 3


@dataclass(frozen=True)
class Agreed:
    """What the ranks have been told together."""

    save: bool = False
    stop: bool = False
    fail: bool = False

    @classmethod
    def of(cls, sums: Tensor) -> Agreed:
        """From the sums [3] over all ranks."""
        return cls(*(value > 0 for value in sums.tolist()))


class Wishes:
    """Those of this rank; any thread may add to them, and none is taken back but a checkpoint that was kept."""

    def __init__(self) -> None:
        self._save, self._stop = threading.Event(), threading.Event()

    def ask_to_save(self) -> None:
        """Keep a checkpoint after this step, and go on."""
        self._save.set()

    def ask_to_stop(self) -> None:
        """Keep a checkpoint after this step, and end."""
        self._stop.set()

    @property
    def stop(self) -> bool:
        """Whether this rank was asked to end."""
        return self._stop.is_set()

    def saved(self) -> None:
        """A checkpoint is on its way: that wish is fulfilled."""
        self._save.clear()

    def flags(self, failed: bool = False) -> Tensor:
        """[3] in float64, to be summed over all ranks."""
        return torch.tensor([self._save.is_set(), self._stop.is_set(), failed], dtype=torch.float64)


@contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM calls ``act`` and leaves the process running; the second one does what it did before.

    Only the main thread can take signals; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: set by other code than Python's

    def handle(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        act()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
