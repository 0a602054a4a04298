"""Loaded batches that stay in memory, so that a small graph is decoded once and not per epoch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

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
        self._shrink_to(self._budget_bytes - size_bytes)
        self._batches[key] = (batch, size_bytes)
        self._bytes += size_bytes

    def weigh(self, key: Key) -> None:
        """Counts what a batch holds by now, with all that was derived from it, and drops what is too much."""
        if key in self._batches:
            batch, counted = self._batches[key]
            size_bytes = max(counted, held_bytes(batch))
            if size_bytes > self._budget_bytes:
                del self._batches[key]
                self._bytes -= counted
                return
            self._batches[key] = (batch, size_bytes)
            self._bytes += size_bytes - counted
            self._shrink_to(self._budget_bytes)

    def _shrink_to(self, num_bytes: int) -> None:
        while self._batches and self._bytes > num_bytes:
            _, (_, freed) = self._batches.popitem(last=False)
            self._bytes -= freed

    def __contains__(self, key: Key) -> bool:
        return key in self._batches

    def clear(self) -> None:
        """Drops all batches."""
        self._batches.clear()
        self._bytes = 0


def held_bytes(value: Any) -> int:
    """Bytes of all tensors in a value, through dataclasses and containers, each memory once."""
    seen: dict[int, int] = {}
    _collect(value, seen, set())
    return sum(seen.values())


def _collect(value: Any, seen: dict[int, int], visited: set[int]) -> None:
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return
    if id(value) in visited:
        return
    visited.add(id(value))
    if is_dataclass(value) and not isinstance(value, type):
        children: Any = vars(value).values()  # with what cached properties have made
    elif isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, tuple | list):
        children = value
    else:
        return
    for child in children:
        _collect(child, seen, visited)
