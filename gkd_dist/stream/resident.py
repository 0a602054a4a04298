"""Loaded batches that stay in memory, so that a small graph is decoded once and not per epoch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from gkd_dist.graph import Batch

Key = TypeVar("Key", bound=Hashable)


class Resident(Generic[Key]):
    """Loaded batches up to a byte budget, least recently used ones going first. Not thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._batches: OrderedDict[Key, tuple[Batch, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Key) -> Batch | None:
        """The batch of ``key``, which thereby counts as used; None where it is not kept."""
        if key not in self._batches:
            return None
        self._batches.move_to_end(key)
        return self._batches[key][0]

    def put(self, key: Key, batch: Batch, size_bytes: int) -> None:
        """Keeps a batch, dropping others for it; one larger than the budget is not kept."""
        if size_bytes > self._budget_bytes or key in self._batches:
            return
        while self._bytes + size_bytes > self._budget_bytes:
            _, (_, freed) = self._batches.popitem(last=False)
            self._bytes -= freed
        self._batches[key] = (batch, size_bytes)
        self._bytes += size_bytes

    def clear(self) -> None:
        """Drops all batches."""
        self._batches.clear()
        self._bytes = 0
