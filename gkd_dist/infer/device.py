"""Where layers are computed: the processor as it is, or a CUDA device fed through pinned memory.

On CUDA every thread has a stream of its own: while one task computes, the next one's input is copied up and the last
one's output down. Nothing waits for the whole device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dist.errors import ConfigError
from gkd_dist.graph import LocalGraph


@dataclass
class Clock:
    """Seconds that a computation took, known when its ``computing`` block has ended."""

    seconds: float = 0.0


class CpuDevice:
    """The processor: nothing is copied. One computation at a time, with a fixed number of threads.

    Results then depend neither on how many tasks are in flight nor on what torch was set to before.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._computing, self._gathering = threading.Lock(), threading.Lock()

    def upload(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself."""
        return tensor

    def upload_graph(self, graph: LocalGraph) -> LocalGraph:
        """``graph`` itself."""
        return graph

    def download(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself."""
        return tensor

    def gathering(self) -> AbstractContextManager[object]:
        """Entered by one thread at a time: no two tiles hold their rows at once."""
        return self._gathering

    @contextmanager
    def computing(self, threads: int) -> Iterator[Clock]:
        """The processor for the time of a ``with`` block, with ``threads`` torch threads."""
        clock = Clock()
        with self._computing:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            started = time.perf_counter()
            try:
                yield clock
            finally:
                clock.seconds = time.perf_counter() - started
                torch.set_num_threads(before)

    def release(self) -> None:
        """Nothing is held."""


class CudaDevice:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self._launching = threading.Lock()  # models are not made for several threads
        if not torch.cuda.is_available():
            raise ConfigError("infer.gpus_per_actor is above 0 but this process sees no CUDA device; set it to 0")
        self._threads = threading.local()

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy on the device, on this thread's stream; the processor goes on at once."""
        with torch.cuda.stream(self._stream()):
            return tensor.pin_memory().to("cuda", non_blocking=True)

    def upload_graph(self, graph: LocalGraph) -> LocalGraph:
        """A copy on the device, like `upload`."""
        with torch.cuda.stream(self._stream()):
            return graph.to("cuda", non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the processor; waits for this thread's stream alone."""
        stream = self._stream()
        with torch.cuda.stream(stream):
            out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            out.copy_(tensor, non_blocking=True)
        stream.synchronize()
        return out

    def gathering(self) -> AbstractContextManager[object]:
        """Entered by all: rows of the next tile go up while one is computed."""
        return nullcontext()

    @contextmanager
    def computing(self, threads: int) -> Iterator[Clock]:
        """This thread's stream for the time of a ``with`` block; the clock shows the device's own time."""
        clock, stream = Clock(), self._stream()
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self._launching, torch.cuda.stream(stream):
            started.record(stream)
            yield clock
            ended.record(stream)
        ended.synchronize()
        clock.seconds = started.elapsed_time(ended) / 1000

    def release(self) -> None:
        """Gives cached memory back to the device."""
        torch.cuda.empty_cache()

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream()
        stream: torch.cuda.Stream = self._threads.stream
        return stream


Device = CpuDevice | CudaDevice


def make_device(name: str) -> Device:
    """The device ``cpu`` or ``cuda``."""
    return CpuDevice() if name == "cpu" else CudaDevice()
