"""Memory of what was read, used again for what is read next.

A system hands out memory in pages that are filled with zeros at the first touch, which takes longer than copying a
file from its cache. Streams read objects of similar size over and over: they keep a few buffers.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

_SLACK = 2  # a buffer up to this many times as large as is needed serves


class BufferPool:
    """Up to ``num_buffers`` buffers that nobody uses; safe from several threads, empty in another process.

    A buffer comes back by itself when its last user, a view or a tensor made of it, is gone.
    """

    def __init__(self, num_buffers: int) -> None:
        self.num_buffers = num_buffers
        self._free: deque[Tensor] = deque()  # no lock: a collection of garbage may give back at any moment

    def __reduce__(self) -> tuple[object, ...]:
        return BufferPool, (self.num_buffers,)

    @property
    def free_bytes(self) -> int:
        """Bytes of the buffers that wait for another use."""
        return sum(buffer.numel() for buffer in list(self._free))

    def room(self, num_bytes: int) -> memoryview:
        """Writable memory of ``num_bytes``, whatever it holds."""
        buffer = self._take(num_bytes)
        if buffer is None:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        array = buffer.numpy()  # what every slice of the view, and every tensor made of one, keeps alive
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return array.data[:num_bytes]

    def _take(self, num_bytes: int) -> Tensor | None:
        """A free buffer that fits; those that do not are let go, because sizes have changed."""
        while True:
            try:
                buffer = self._free.popleft()
            except IndexError:
                return None
            if num_bytes <= buffer.numel() <= _SLACK * num_bytes:
                return buffer

    def _give_back(self, buffer: Tensor) -> None:
        if len(self._free) < self.num_buffers:
            self._free.append(buffer)
